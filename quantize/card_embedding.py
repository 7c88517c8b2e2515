"""Puts a card into the file that it describes, by choice: the header grows by one key, the weights stay as they are.

What a file costs is known only when it is whole, so the card is added to a copy, which then takes the file's place.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import msgspec

from app.errors import StorageError, VerificationError
from app.models.card import Card
from app.models.embedded_card import embedded_card, header_with_card, plain_header
from app.models.gguf import read_header
from quantize.card import remove_card
from quantize.writer import AtomicFile

_AT_ONCE = 1 << 22


def embed_card(card: Card, path: Path) -> None:
    """Write the card into its file, and take away the one beside it.

    The file is read again on the way: raises `VerificationError` if it is not the one that the card describes (it is
    left as it was then), `StorageError` if there is no room for a copy.
    """
    header = read_header(path, largest_array=0)
    before = header_with_card(header, msgspec.json.encode(card).decode())
    size = len(before) + header.file_size - header.data_offset
    with AtomicFile(path, size) as copy, _open(path) as file:
        digest = hashlib.sha256(file.read(header.data_offset))
        copy.write_at(0, memoryview(before))
        position = len(before)
        while piece := file.read(_AT_ONCE):
            digest.update(piece)
            copy.write_at(position, memoryview(piece))
            position += len(piece)
        if digest.hexdigest() != card.file.sha256:
            raise VerificationError(f"{path}: changed since it was made: the card is not its own any more")
        copy.check(lambda part: _verify(part, card, path))
        remove_card(path)
        copy.publish()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _verify(part: Path, card: Card, path: Path) -> None:
    header = read_header(part, largest_array=0)
    plain = hashlib.sha256(plain_header(header)).hexdigest()
    if embedded_card(header) != card or plain != card.file.header_sha256:
        raise VerificationError(f"{path}: the card that was written into it cannot be read back")
