"""Reads the header of a GGUF file, within bounds.

Every count, length and dimension is checked against the size of the file before anything is allocated, so that a
hostile or truncated file costs nothing but a clear `ModelFileError`. Pure Python, and light to import: the server reads
architecture, context length and chat template with it, and llama.cpp stays unloaded.
"""

from __future__ import annotations

import dataclasses
import io
import math
import struct
from pathlib import Path
from typing import Any

from app.errors import StorageError
from app.models.gguf_cursor import Cursor
from app.models.gguf_types import FORMATS, TENSOR_TYPES, ValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_MAX_KEY_BYTES = 1 << 16
_MAX_STRING_BYTES = 1 << 26
_MAX_ARRAY_ITEMS = 1 << 22
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_NAME_BYTES = 63  # ggml keeps 64 with the terminating zero
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_SMALLEST_KEY_BYTES = 8 + 1 + 4 + 1  # length, one letter, type, one byte of value
_SMALLEST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True, slots=True)
class SkippedArray:
    """Stands for an array that was not read because the caller asked for small ones only."""

    type: ValueType
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's place in the file; `dims` in ggml's order (fastest first), `offset` from the start of the data."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        """The ggml name of the type, such as `q4_K`."""
        return TENSOR_TYPES[self.type][0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions in numpy's order (slowest first)."""
        return self.dims[::-1]


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """Everything in a GGUF file but the weights; `item_types` are those of the arrays.

    The keys end at byte `keys_end`, the table of tensors at `tensors_end`, and the weights begin at `data_offset`.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    types: dict[str, ValueType]
    item_types: dict[str, ValueType]
    tensors: list[TensorInfo]
    alignment: int
    keys_end: int
    tensors_end: int
    data_offset: int
    file_size: int

    def text(self, key: str) -> str | None:
        """Return a string value, or None if the key is absent or not a string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def integer(self, key: str) -> int | None:
        """Return an integer value, or None if the key is absent or not an integer."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def architecture(self) -> str | None:
        """Such as `llama`."""
        return self.text("general.architecture")

    @property
    def name(self) -> str | None:
        """The model's own name for itself."""
        return self.text("general.name")

    @property
    def context_length(self) -> int | None:
        """The number of tokens that the model was trained for."""
        return self.integer(f"{self.architecture}.context_length")

    @property
    def file_type(self) -> int | None:
        """llama.cpp's number of the recipe, such as 15 for Q4_K_M."""
        return self.integer("general.file_type")

    @property
    def chat_template(self) -> str | None:
        """The default chat template's Jinja source."""
        return self.text("tokenizer.chat_template")


def read_header(path: Path | str, *, largest_array: int | None = None) -> Header:
    """Read a GGUF file's header.

    Arrays with more than `largest_array` items are stepped over and stand as `SkippedArray` (None: all are read). Bytes
    that are not UTF-8 survive as surrogate escapes. Raises `ModelFileError` for anything that is damaged, truncated
    or out of bounds, and `StorageError` if the file can't be opened.
    """
    path = Path(path)
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            return _read(Cursor(file, path, file_size), largest_array)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_header_bytes(content: bytes, path: Path, file_size: int) -> Header:
    """Read a header from memory: the first bytes of a file of `file_size` bytes; `path` is for messages.

    Raises `ModelFileError`, as `read_header` does.
    """
    return _read(Cursor(io.BytesIO(content), path, file_size), None)


def _read(cursor: Cursor, largest_array: int | None) -> Header:
    if cursor.file_size < 24 or cursor.take(4, "the magic") != MAGIC:
        raise cursor.refuse("it does not begin with GGUF" if cursor.file_size >= 4 else "it is too short")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        hint = " (big-endian?)" if version & 0xFFFF == 0 and version else ""
        raise cursor.refuse(f"version {version}{hint}; versions {', '.join(map(str, VERSIONS))} are known")
    tensor_count = cursor.number("Q", "the number of tensors")
    key_count = cursor.number("Q", "the number of keys")
    for count, smallest, most, what in (
        (key_count, _SMALLEST_KEY_BYTES, _MAX_KEYS, "keys"),
        (tensor_count, _SMALLEST_TENSOR_BYTES, _MAX_TENSORS, "tensors"),
    ):
        if count > most or count * smallest > cursor.left:
            raise cursor.refuse(f"it claims {count} {what} in {cursor.file_size} bytes")
    metadata: dict[str, Any] = {}
    types: dict[str, ValueType] = {}
    item_types: dict[str, ValueType] = {}
    for _ in range(key_count):
        key = _name(cursor, cursor.string("a key", _MAX_KEY_BYTES), "a key")
        if not key or key in metadata:
            raise cursor.refuse(f"the key {key!r} appears twice" if key else "a key is empty")
        types[key] = _value_type(cursor, key)
        if types[key] is ValueType.ARRAY:
            item_types[key] = _value_type(cursor, key)
            metadata[key] = _array(cursor, key, item_types[key], largest_array)
        else:
            metadata[key] = _value(cursor, key, types[key])
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.refuse(f"general.alignment is {alignment!r}; it must be a power of two")
    keys_end = cursor.position
    tensors = _tensors(cursor, tensor_count, alignment)
    tensors_end = cursor.position
    data_offset = -(-tensors_end // alignment) * alignment
    end = max((data_offset + tensor.offset + tensor.nbytes for tensor in tensors), default=0)
    if end > cursor.file_size:
        raise cursor.refuse(f"truncated: the tensors end at byte {end}, the file at {cursor.file_size}")
    return Header(
        cursor.path, version, metadata, types, item_types, tensors, alignment, keys_end, tensors_end, data_offset,
        cursor.file_size,
    )  # fmt: skip


def _name(cursor: Cursor, raw: bytes, what: str) -> str:
    if b"\0" in raw:
        raise cursor.refuse(f"{what} has a zero byte, where C would cut it off: {raw[:40]!r}")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise cursor.refuse(f"{what} is not UTF-8: {raw[:40]!r}") from None


def _value_type(cursor: Cursor, key: str) -> ValueType:
    number = cursor.number("I", f"the type of {key!r}")
    try:
        return ValueType(number)
    except ValueError:
        raise cursor.refuse(f"{key!r} has the unknown value type {number}") from None


def _value(cursor: Cursor, key: str, value_type: ValueType) -> Any:
    if value_type is ValueType.STRING:
        return cursor.string(f"the value of {key!r}", _MAX_STRING_BYTES).decode(errors="surrogateescape")
    if value_type is ValueType.BOOL:
        return bool(cursor.number("B", f"the value of {key!r}"))
    return cursor.number(FORMATS[value_type], f"the value of {key!r}")


def _array(cursor: Cursor, key: str, item_type: ValueType, largest_array: int | None) -> Any:
    length = cursor.number("Q", f"the length of {key!r}")
    if item_type is ValueType.ARRAY:
        raise cursor.refuse(f"{key!r} is an array of arrays")
    item_bytes = 8 if item_type is ValueType.STRING else struct.calcsize("<" + FORMATS[item_type])
    if length > _MAX_ARRAY_ITEMS or length * item_bytes > cursor.left:
        raise cursor.refuse(f"the array {key!r} claims {length} items; {cursor.left} bytes are left")
    what = f"the array {key!r}"
    wanted = largest_array is None or length <= largest_array
    if wanted:
        cursor.keep(length)
    if item_type is not ValueType.STRING:
        if not wanted:
            cursor.skip(length * item_bytes, what)
            return SkippedArray(item_type, length)
        return list(struct.unpack(f"<{length}{FORMATS[item_type]}", cursor.take(length * item_bytes, what)))
    strings = cursor.strings(length, what, _MAX_STRING_BYTES, keep=wanted)
    return strings if wanted else SkippedArray(item_type, length)


def _tensors(cursor: Cursor, count: int, alignment: int) -> list[TensorInfo]:
    tensors: list[TensorInfo] = []
    names: set[str] = set()
    expected = 0  # ggml lays tensors out one after the other, and reads no other layout
    for _ in range(count):
        name = _name(cursor, cursor.string("a tensor's name", _MAX_NAME_BYTES), "a tensor's name")
        if not name or name in names:
            raise cursor.refuse(f"the tensor {name!r} appears twice" if name else "a tensor has no name")
        names.add(name)
        dimensions = cursor.number("I", f"the shape of {name!r}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise cursor.refuse(f"the tensor {name!r} has {dimensions} dimensions")
        dims = tuple(cursor.number("Q", f"the shape of {name!r}") for _ in range(dimensions))
        number = cursor.number("I", f"the type of {name!r}")
        offset = cursor.number("Q", f"the offset of {name!r}")
        nbytes = _tensor_bytes(cursor, name, dims, number)
        if offset != expected:
            raise cursor.refuse(f"the tensor {name!r} is at offset {offset}; {expected} was expected")
        tensors.append(TensorInfo(name, dims, number, offset, nbytes))
        expected = -(-(offset + nbytes) // alignment) * alignment
    return tensors


def _tensor_bytes(cursor: Cursor, name: str, dims: tuple[int, ...], number: int) -> int:
    if number not in TENSOR_TYPES:
        raise cursor.refuse(f"the tensor {name!r} has the unknown type {number}")
    type_name, block_weights, block_bytes = TENSOR_TYPES[number]
    if 0 in dims or dims[0] % block_weights:
        raise cursor.refuse(f"the tensor {name!r} of type {type_name} has the impossible shape {dims}")
    nbytes = math.prod(dims) // block_weights * block_bytes
    if nbytes > cursor.file_size:
        raise cursor.refuse(
            f"truncated: the tensor {name!r} of shape {dims} has {nbytes} bytes, the file {cursor.file_size}"
        )
    return nbytes
