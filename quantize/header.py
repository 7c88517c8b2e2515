"""Builds a GGUF's header: typed keys in their order, and the table of tensors. Pure."""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from app.errors import CheckpointError
from app.models.gguf import DEFAULT_ALIGNMENT, MAGIC
from app.models.gguf_types import FORMATS, TENSOR_TYPE_NUMBERS, ValueType

VERSION = 3
QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION: of the layout of its blocks

_LENGTH = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Value:
    """A metadata value; `item_type` is set for arrays only."""

    type: ValueType
    content: Any
    item_type: ValueType | None = None

    @functools.cached_property
    def encoded(self) -> bytes:
        """The value as it stands in a header, behind its type; a vocabulary is encoded once for all its headers.

        Raises what `struct` and `str.encode` raise.
        """
        if self.type is ValueType.STRING:
            return _string(self.content)
        if self.type is not ValueType.ARRAY:
            return struct.pack("<" + FORMATS[self.type], self.content)
        if self.item_type is None:
            raise AssertionError("an array without the type of its items")
        head = struct.pack("<IQ", self.item_type, len(self.content))
        if self.item_type is ValueType.STRING:
            return head + _strings(self.content)
        return head + struct.pack(f"<{len(self.content)}{FORMATS[self.item_type]}", *self.content)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's line in the header; `shape` in numpy's order, `offset` from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int


class KeyTable:
    """Metadata keys in the order in which they were first set; empty strings and arrays are left out, as upstream."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}

    def text(self, key: str, content: str | bytes) -> None:
        """Set a string."""
        if content:
            self.values[key] = Value(ValueType.STRING, content)

    def u32(self, key: str, content: int) -> None:
        """Set an unsigned integer."""
        self.values[key] = Value(ValueType.UINT32, content)

    def i32(self, key: str, content: int) -> None:
        """Set a signed integer."""
        self.values[key] = Value(ValueType.INT32, content)

    def f32(self, key: str, content: float) -> None:
        """Set a number."""
        self.values[key] = Value(ValueType.FLOAT32, content)

    def boolean(self, key: str, content: bool) -> None:
        """Set a truth value."""
        self.values[key] = Value(ValueType.BOOL, content)

    def array(self, key: str, item_type: ValueType, content: Sequence[Any]) -> None:
        """Set an array of strings (str or bytes) or numbers."""
        if content:
            self.values[key] = Value(ValueType.ARRAY, content, item_type)

    def place_after(self, earlier: str, key: str) -> None:
        """Move a key to right behind another; both are set."""
        value = self.values.pop(key)
        items = list(self.values.items())
        place = list(self.values).index(earlier) + 1
        self.values = dict([*items[:place], (key, value), *items[place:]])

    def with_file_type(self, file_type: int) -> KeyTable:
        """Return the same keys with another file type, where the one before is."""
        table = KeyTable()
        table.values = self.values | {"general.file_type": Value(ValueType.UINT32, file_type)}
        return table

    def quantized(self, file_type: int) -> KeyTable:
        """Return the keys as llama-quantize leaves them: version and file type come last."""
        table = KeyTable()
        last = {
            "general.quantization_version": Value(ValueType.UINT32, QUANTIZATION_VERSION),
            "general.file_type": Value(ValueType.UINT32, file_type),
        }
        table.values = {key: value for key, value in self.values.items() if key not in last} | last
        return table


def _string(text: str | bytes) -> bytes:
    raw = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    return _LENGTH.pack(len(raw)) + raw


def _strings(texts: Sequence[str | bytes]) -> bytes:
    pack = _LENGTH.pack
    raw = [text.encode(errors="surrogateescape") if isinstance(text, str) else text for text in texts]
    return b"".join([piece for text in raw for piece in (pack(len(text)), text)])


def aligned(size: int) -> int:
    """Round up to where the next tensor may begin."""
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def encode_header(keys: KeyTable, tensors: Iterable[TensorEntry]) -> bytes:
    """Return everything that precedes the weights, padded to where they begin.

    Raises `CheckpointError` that names the key if a value is out of its type's range.
    """
    entries = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(keys.values))]
    for key, value in keys.values.items():
        try:
            parts += [_string(key), struct.pack("<I", value.type), value.encoded]
        except (struct.error, OverflowError, TypeError, UnicodeEncodeError) as error:  # also halves of letters
            raise CheckpointError(f"the key {key} cannot hold {str(value.content)[:80]}: {error}") from error
    for entry in entries:
        dims = entry.shape[::-1]
        number = TENSOR_TYPE_NUMBERS[entry.type_name]
        parts += [_string(entry.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, entry.offset)]
    header = b"".join(parts)
    return header + bytes(aligned(len(header)) - len(header))
