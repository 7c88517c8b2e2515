"""The card of a quantized file: what it was made of and how, and what that cost. Reads it; light to import.

A card lies beside its file as `FILE.card.json`, tied to it by sha256, or in the file itself under `pestle.card`. All
digests are those of the file without keys of ours, which is upstream's file: see `app.models.embedded_card`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from app.errors import ModelFileError, StorageError
from app.models.gguf import Header

VERSION = 1
SUFFIX = ".card.json"
TEXT_SUFFIX = ".card.md"
PLOT_SUFFIX = ".card.svg"

_MOST_BYTES = 1 << 26  # a line for each of 131,072 tensors takes less


class FileIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A file and what is in it; `sha256` is lower-case hex, None if it was not computed."""

    name: str
    bytes: int
    sha256: str | None


class QuantizedFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file that the card belongs to. `header_bytes` precede the weights; `header_sha256` is the digest of these."""

    name: str
    bytes: int
    sha256: str
    header_bytes: int
    header_sha256: str


class Imatrix(msgspec.Struct, frozen=True, kw_only=True):
    """The importance matrix that was used; `name` as it was given."""

    name: str
    sha256: str


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What the user decided besides the type: pairs of a regular expression and a tensor type, in their order."""

    overrides: list[tuple[str, str]] = []
    output: str | None = None
    embedding: str | None = None
    imatrix: Imatrix | None = None
    allow_requantize: bool = False


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights came from: a folder's or file's name, or `org/name` and the commit on the Hub."""

    kind: Literal["folder", "hub", "gguf"]
    name: str
    revision: str | None
    files: list[FileIdentity]


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor, in the file's order.

    `shape` has rows first, `bytes` are without padding. `sha256_through` is the digest of the file from its first byte
    to the tensor's last: in a file that was damaged, the first that differs names the tensor. `relative_error` is the
    root mean square of what changed divided by that of the weights, None if it was not measured.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    sha256_through: str
    relative_error: float | None = None


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """What the quantization costs over a text, and how fast the file is on the machine that measured it.

    Divergences (KLD) are in nats, from the reference's predictions; `same_top` is a share; speeds are tokens a second.
    `reference` says what it was compared with, and how that came from the source.
    """

    reference: str
    text: str
    text_sha256: str
    chunks: int
    chunk_tokens: int
    predictions: int
    perplexity: float
    perplexity_error: float
    reference_perplexity: float
    kld_mean: float
    kld_error: float
    kld_99: float
    kld_max: float
    same_top: float
    prompt_speed: float
    decode_speed: float
    machine: str
    threads: int


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of a file. `made` is UTC, ISO 8601; `library` names the build of llama.cpp."""

    version: int = VERSION
    file: QuantizedFile
    type: str
    recipe: Recipe
    source: Source
    library: str
    pestle: str
    made: str
    weights: int
    bits_per_weight: float
    tensors: list[Tensor]
    quality: Quality | None = None


def card_path(file: Path) -> Path:
    """Return where the card of a file lies."""
    return file.with_name(file.name + SUFFIX)


def read_card(file: Path) -> Card | None:
    """Return the card beside a GGUF, or None if there is none. `mismatch` tells whether it belongs to the file.

    Raises `ModelFileError` for a damaged card or one of a version that is not known, `StorageError` if it cannot be
    read.
    """
    path = card_path(file)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ModelFileError(f"{path}: too large for a card: at most {_MOST_BYTES} bytes are read")
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    return decode_card(content, str(path))


def decode_card(content: bytes | str, where: str) -> Card:
    """Return the card that JSON holds. Raises `ModelFileError` that begins with `where`."""
    try:
        version = msgspec.json.decode(content, type=_Version).version
        if version != VERSION:
            raise ModelFileError(f"{where}: a card of version {version}; {VERSION} is known: update Pestle")
        return msgspec.json.decode(content, type=Card)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError(f"{where}: a damaged card: {error}") from error


class _Version(msgspec.Struct):
    version: int


def mismatch(card: Card, header: Header, added_bytes: int = 0) -> str | None:
    """Tell what says that a card is not the file's, from its header alone; None if nothing does.

    `added_bytes` is how much longer the file is for keys of ours in it. That every byte is right, only a digest of the
    whole file says.
    """
    size = header.file_size - added_bytes
    if card.file.bytes != size:
        return f"the card is of a file of {card.file.bytes} bytes, this one has {size}"
    found = [(tensor.name, tensor.type_name, tensor.shape, tensor.nbytes) for tensor in header.tensors]
    known = [(tensor.name, tensor.type, tensor.shape, tensor.bytes) for tensor in card.tensors]
    if found != known:
        return "the card lists other tensors than the file holds"
    return None
