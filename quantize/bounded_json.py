"""JSON from files that nobody vouches for: decoded only if its values fit into memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec

MOST_VALUES = 1 << 23  # four times what the largest vocabularies have; an object takes some 64 bytes


def decode_json(text: bytes, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the content of a JSON text. Raises `ValueError` or `RecursionError` for one that is none or too large.

    `pairs_hook` makes each object from its pairs, among which a key may be twice.
    """
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES} values")
    if pairs_hook is not None:
        return json.loads(text, object_pairs_hook=pairs_hook)
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(text)  # Python writes NaN and Infinity, which msgspec refuses as it should
