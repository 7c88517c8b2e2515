"""Reads safetensors: one file, or shards with an index. Headers are checked; weights are read in pieces, never whole.

Pieces are read with `preadv` into the caller's buffer, not through a memory map: a file that someone truncates
meanwhile is then an error and not a SIGBUS, and no page of the model ever counts as this process's memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError, StorageError
from quantize.bounded_json import decode_json
from quantize.tensors import Part

INDEX_NAME = "model.safetensors.index.json"
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_HEADER_AT_ONCE = 1 << 18  # bytes; most headers are smaller
_MAX_NAME_LETTERS = 1 << 10
_MAX_DIMENSIONS = 8
_MAX_NUMBER = 1 << 63
_MOST_SHOWN = 200
_DECODED_AT_ONCE = 1 << 18  # weights; the buffers of a decoder grow with this and not with what is asked for
_ALL_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a shard; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int
    nbytes: int

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """What must be read for its weights: itself."""
        return (self,)

    def stored_bytes(self, weights: int) -> int:
        """Return how many bytes of the shards so many of its weights stand for."""
        return self.nbytes * weights // max(math.prod(self.shape), 1)


Told = Callable[[int], None]
"""Is told how many more bytes there are."""
Wanted = Callable[["Part | None"], bool]
"""Says of a part of a tensor whether it is wanted; of None, what needs no weight of the checkpoint."""
ReadHeader = Callable[[Path], tuple[int, bytes]]
"""Returns the size of a shard, and its bytes up to the data."""


class Decoder(Protocol):
    """Turns what a quantized checkpoint stores into the numbers that it stands for."""

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """Every stored tensor that is read, the one with the weights first."""

    def decode(self, checkpoint: Checkpoint, first: int, out: NDArray[np.float32]) -> None:
        """Fill `out` (rows × weights a row) with the rows from `first` on. Called from several threads at once.

        Raises `CheckpointError` that names the stored tensor whose content is impossible.
        """


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DecodedTensor(StoredTensor):
    """F32 weights that are computed while they are read. `name`, `shard` and `nbytes` are those of what is stored.

    `block_type` is ggml's name of the type that they are stored in, if it is one of ggml's: a file that wants them in
    that very type takes the bytes as they are.
    """

    decoder: Decoder
    block_type: str | None = None

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """What must be read for its weights."""
        return self.decoder.origins

    def fill(self, checkpoint: Checkpoint, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the F32 weights from byte `offset` on; both are multiples of 4."""
        out = np.frombuffer(buffer, dtype=np.float32)
        width, first = self.shape[-1], offset // 4
        rows_at_once = max(1, _DECODED_AT_ONCE // width)
        while len(out):
            row, column = divmod(first, width)
            rows = min(len(out) // width, rows_at_once)
            if column == 0 and rows:
                taken = rows * width
                self.decoder.decode(checkpoint, row, out[:taken].reshape(rows, width))
            else:
                whole = np.empty((1, width), dtype=np.float32)
                self.decoder.decode(checkpoint, row, whole)
                taken = min(width - column, len(out))
                out[:taken] = whole[0, column : column + taken]
            out, first = out[taken:], first + taken


class Checkpoint:
    """All tensors of a model's folder, in the order of the shards' names, by name within each.

    Where the weights are quantized, `dequantize.decode` replaces what is stored by what it stands for.
    """

    def __init__(self, tensors: dict[str, StoredTensor], shards: list[Path]) -> None:
        self.tensors = tensors
        self.shards = shards
        self._files: dict[Path, int] = {}

    @classmethod
    def open(cls, folder: Path, elsewhere: Mapping[str, ReadHeader] = {}) -> Self:
        """Index a folder's safetensors. Raises `CheckpointError` for anything missing, truncated or contradictory.

        `elsewhere` are shards that are not in the folder, by the names that they would have there.
        """
        names, weight_map = _shard_names(folder, elsewhere)
        tensors: dict[str, StoredTensor] = {}
        for name in names:
            for tensor in _tensors_of(folder / name, elsewhere.get(name)):
                if tensor.name in tensors:
                    where = tensors[tensor.name].shard.name
                    raise CheckpointError(f"{folder / name}: the tensor {tensor.name!r} is also in {where}")
                tensors[tensor.name] = tensor
        _check_index(folder, weight_map, tensors)
        return cls(tensors, [folder / name for name in names])

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on. Safe to call from several threads."""
        if isinstance(tensor, DecodedTensor):
            tensor.fill(self, offset, buffer)
            return
        position = tensor.offset + offset
        try:
            done = 0
            while done < len(buffer):
                read = os.preadv(self._files[tensor.shard], [buffer[done:]], position + done)
                if read == 0:
                    raise CheckpointError(f"{tensor.shard}: truncated while it was read, at byte {position + done}")
                done += read
        except OSError as error:
            raise StorageError(f"{tensor.shard}: cannot be read: {error.strerror or error}") from error

    def rounds(self, parts: Sequence[Part], told: Told) -> Generator[Wanted]:  # noqa: ARG002 - as `StreamedCheckpoint`
        """Yield, for each round in which weights are there to be read, whose they are. Here, all at once."""
        yield lambda _: True

    def expect(self, parts: Sequence[Part], output: int) -> int:  # noqa: ARG002 - as `StreamedCheckpoint`
        """Return how many bytes must be fetched for these parts, which `told` of `rounds` will hear of."""
        return 0

    def stated(self, shard: Path) -> tuple[int, str | None] | None:  # noqa: ARG002 - as `StreamedCheckpoint`
        """Return a shard's size and sha256 as its publisher states them; None if the file is there to be looked at."""
        return None

    def __enter__(self) -> Self:
        """Open every shard."""
        try:
            for shard in self.shards:
                self._files[shard] = os.open(shard, os.O_RDONLY)
        except OSError as error:
            self.close()
            raise StorageError(f"{error.filename}: cannot be read: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        """Close every shard."""
        self.close()

    def close(self) -> None:
        """Close every shard that is open."""
        while self._files:
            os.close(self._files.popitem()[1])


def _shard_names(folder: Path, elsewhere: Mapping[str, ReadHeader]) -> tuple[list[str], dict[str, str]]:
    index = folder / INDEX_NAME
    if not index.is_file():
        there = {path.name for path in folder.glob("model*.safetensors") if path.is_file()}
        names = sorted(there | elsewhere.keys())
        if not names:
            others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf"})
            hint = f" (found {', '.join(others[:5])}; only safetensors are read)" if others else ""
            raise CheckpointError(f"{folder}: no model.safetensors and no {INDEX_NAME}{hint}")
        return names, {}
    try:
        weight_map = decode_json(_index_content(index))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no usable weight_map: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must say for each tensor the name of its file")
    if not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {shown(name)} is not the name of a safetensors file in the same folder")
        if name not in elsewhere and not (folder / name).is_file():
            raise CheckpointError(f"{index}: names the file {name}, which is missing from {folder}")
    return names, weight_map


def _index_content(index: Path) -> bytes:
    try:
        if (size := index.stat().st_size) > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{index}: {size} bytes; at most {_MAX_HEADER_BYTES} are read")
        return index.read_bytes()
    except OSError as error:
        raise StorageError(f"{index}: cannot be read: {error.strerror or error}") from error


def shown(content: object) -> str:
    """Return what a file holds as a message can show it: what is not printable escaped, and not too much of it."""
    text = repr(content)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    if not weight_map:
        return
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard.name != shard:
            raise CheckpointError(f"{folder / shard}: lacks the tensor {shown(name)} that {INDEX_NAME} places there")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{tensor.shard}: holds the tensor {shown(name)}, which {INDEX_NAME} does not know")


def read_header(path: Path, size: int, read: Callable[[int], bytes]) -> bytes:
    """Return the bytes of a shard of `size` bytes up to its data, once they are known to be no more than they can be.

    `read` returns so many bytes of its beginning. Raises `CheckpointError`.
    """
    start = read(min(size, _HEADER_AT_ONCE))
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8 or length > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: truncated or no safetensors: {size} bytes, header of {length} bytes")
    end = 8 + length
    return start[:end] if end <= len(start) else read(end)


def _read_local_header(path: Path) -> tuple[int, bytes]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return size, read_header(path, size, lambda count: os.pread(file.fileno(), count, 0))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _tensors_of(path: Path, elsewhere: ReadHeader | None) -> list[StoredTensor]:
    size, header = elsewhere(path) if elsewhere else _read_local_header(path)
    try:
        entries = decode_json(header[8:], _unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors = [_stored(path, name, entry, len(header)) for name, entry in sorted(entries.items())]
    _check_layout(path, tensors, len(header), size)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} appears twice")
    return entries


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if len(name) > _MAX_NAME_LETTERS or "\0" in name:
        raise CheckpointError(f"{path}: {shown(name)} is no tensor's name: a name of {len(name)} letters")
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry of {name!r} is damaged: {shown(error)}") from error
    if len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: the tensor {name!r} has {len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number < _MAX_NUMBER for number in (*shape, begin, end)):
        raise CheckpointError(f"{path}: the tensor {name!r} has shape {shown(shape)} and offsets {shown((begin, end))}")
    if not isinstance(dtype, str) or dtype not in _ALL_DTYPE_BITS:
        raise CheckpointError(f"{path}: the tensor {name!r} has the unknown dtype {shown(dtype)}")
    nbytes = math.prod(shape) * _ALL_DTYPE_BITS[dtype] // 8
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: the tensor {name!r} ({dtype}, shape {shape}) has {nbytes} bytes; its offsets leave {end - begin}"
        )
    return StoredTensor(name, dtype, shape, path, data_start + begin, nbytes)


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    expected = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != expected:
            what = "overlaps the one before it" if tensor.offset < expected else "leaves a hole before it"
            raise CheckpointError(f"{path}: the tensor {tensor.name!r} {what} (byte {tensor.offset}, not {expected})")
        expected += tensor.nbytes
        if expected > size:
            raise CheckpointError(f"{path}: truncated: {tensor.name!r} ends at byte {expected}, the file at {size}")
    if expected != size:
        raise CheckpointError(f"{path}: {size - expected} bytes after the last tensor belong to none")
