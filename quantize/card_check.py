"""Hashes a file again and compares it with its card, whose digests tell where the first difference is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from app.errors import StorageError
from app.models.card import Card
from app.models.embedded_card import plain_header
from app.models.gguf import Header
from quantize.verdict import FILE, HEADER, TENSOR, Difference

_AT_ONCE = 1 << 20
CARD = "card"


def hash_file(header: Header, progress: Callable[[int, int], None] | None = None) -> tuple[str, list[str]]:
    """Return the sha256 of a file, and those of its beginnings: through the header, and through each tensor's end.

    A card in the file is left out, as if it was beside it. Raises `StorageError` if the file cannot be read to the end
    that it had, and what `plain_header` raises.
    """
    position = header.data_offset
    marks = [position, *(position + tensor.offset + tensor.nbytes for tensor in header.tensors)]
    digest, through = hashlib.sha256(plain_header(header)), []
    try:
        with header.path.open("rb") as file:
            file.seek(position)
            for mark in [*marks, header.file_size]:
                while position < mark:
                    data = file.read(min(_AT_ONCE, mark - position))
                    if not data:
                        raise StorageError(f"{header.path}: truncated while it was read, at byte {position}")
                    digest.update(data)
                    position += len(data)
                    if progress is not None:
                        progress(position, header.file_size)
                through.append(digest.copy().hexdigest())
    except OSError as error:
        raise StorageError(f"{header.path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest(), through[:-1]


def card_differences(
    header: Header, card: Card, problem: str | None, sha256: str, through: list[str]
) -> Iterator[Difference]:
    """Yield what a card says against a file: the first place from which on the bytes differ.

    `problem` is what the header alone tells, if it does.
    """
    if sha256 == card.file.sha256:
        return
    if problem:
        yield Difference(CARD, FILE, problem)
    elif through[0] != card.file.header_sha256:
        yield Difference(CARD, HEADER, "the header is not the one that was written: keys, names or types were changed")
    else:
        yield _first_damage(header, card, through[1:])


def _first_damage(header: Header, card: Card, through: list[str]) -> Difference:
    begin = header.data_offset
    for tensor, known, found in zip(header.tensors, card.tensors, through, strict=True):
        end = header.data_offset + tensor.offset + tensor.nbytes
        if found != known.sha256_through:
            message = f"the first damage is in {tensor.name} ({tensor.type_name}): bytes {begin} to {end} of the file"
            return Difference(CARD, TENSOR, message, tensor.name)
        begin = end
    return Difference(CARD, FILE, f"bytes {begin} to {header.file_size}, behind the last tensor, were changed")
