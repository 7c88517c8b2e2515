"""The card in the file itself: one key, the last, which can be taken out again to the byte.

The rest is the file that upstream's tools make; the card's digests and sizes are those of that rest.
"""

from __future__ import annotations

import struct
from pathlib import Path

from app.errors import ModelFileError, StorageError
from app.models.card import Card, decode_card, mismatch, read_card
from app.models.gguf import Header
from app.models.gguf_types import ValueType

CARD_KEY = "pestle.card"

_COUNT_OFFSET = 16  # of the number of keys: behind magic, version and the number of tensors
_COUNT = struct.Struct("<Q")


def embedded_card(header: Header) -> Card | None:
    """Return the card in a file, None if there is none. Raises `ModelFileError` for a damaged one."""
    text = header.text(CARD_KEY)
    return None if text is None else decode_card(_raw(text), f"{header.path}: the key {CARD_KEY}")


def find_card(header: Header) -> tuple[Card, str | None] | None:
    """Return the card in a file or beside it, and what tells that it is another file's, as far as the header does.

    Raises `ModelFileError` for a damaged card, `StorageError` if it cannot be read.
    """
    card = embedded_card(header)
    if card is not None:
        added = header.data_offset - len(plain_header(header))
        return card, mismatch(card, header, added)
    card = read_card(header.path)
    return None if card is None else (card, mismatch(card, header))


def plain_header(header: Header) -> bytes:
    """Return the bytes before the weights as they are without a card in the file.

    Raises `ModelFileError` if the card is not the last key, as ours is, and `StorageError`.
    """
    raw = _before_weights(header)
    text = header.text(CARD_KEY)
    if text is None:
        return raw
    entry = card_entry(text)
    start = header.keys_end - len(entry)
    if raw[start : header.keys_end] != entry:
        raise ModelFileError(f"{header.path}: the key {CARD_KEY} is not the last; another program has changed the file")
    return _assembled(header, raw, raw[24:start], -1)


def header_with_card(header: Header, text: str) -> bytes:
    """Return the bytes before the weights with a card's JSON added to a file that has none. Raises `StorageError`."""
    raw = _before_weights(header)
    return _assembled(header, raw, raw[24 : header.keys_end] + card_entry(text), 1)


def card_entry(text: str) -> bytes:
    """Return the key and its value as they stand in the file."""
    key, value = CARD_KEY.encode(), _raw(text)
    return _COUNT.pack(len(key)) + key + struct.pack("<I", ValueType.STRING) + _COUNT.pack(len(value)) + value


def _assembled(header: Header, raw: bytes, keys: bytes, more: int) -> bytes:
    count = _COUNT.unpack_from(raw, _COUNT_OFFSET)[0] + more
    whole = raw[:_COUNT_OFFSET] + _COUNT.pack(count) + keys + raw[header.keys_end : header.tensors_end]
    return whole + bytes(-len(whole) % header.alignment)


def _before_weights(header: Header) -> bytes:
    path: Path = header.path
    try:
        with path.open("rb") as file:
            raw = file.read(header.data_offset)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) != header.data_offset:
        raise ModelFileError(f"{path}: truncated while it was read")
    return raw


def _raw(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
