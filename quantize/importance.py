"""Reads importance matrices: how much each column of a tensor's weights matters, as llama-imatrix measured it.

Both of its formats are read: the GGUF one, and the older .dat. Only an index is kept; the numbers of a tensor (of one
expert) are read when its rows are encoded, so that memory does not grow with the number of experts.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from app.errors import ModelFileError, StorageError, UsageError
from app.models.gguf import MAGIC, Header, TensorInfo, read_header
from app.models.gguf_types import ValueType
from quantize.header import Value
from quantize.plan import PlannedTensor
from quantize.recipe import NEEDS_IMPORTANCE

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_KEY_BYTES = 127  # what llama.cpp's overrides of keys hold
_MOST_ENTRIES = 1 << 17
_MOST_EXPERTS = 1 << 16
_MOST_NAME_BYTES = 1 << 12
_AT_ONCE = 1 << 20
_UNQUANTIZED = {"f32", "f16", "bf16"}
_EMBEDDINGS = {"token_embd.weight", "per_layer_token_embd.weight"}
_MAY_LACK = {*_EMBEDDINGS, "output.weight"}
_NEVER_WITHOUT = {"iq2_xxs", "iq2_xs", "iq1_s"}  # ggml ends the process


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's sums: where in the file they are, how many, and what each expert's are divided by (0: not seen)."""

    offset: int
    values: int
    counts: tuple[int, ...]


class ImportanceMatrix:
    """The index of a file. A context manager: `columns` can be called within it, from several threads."""

    def __init__(self, path: Path, entries: dict[str, Entry], dataset: bytes | None, chunks: int, name: bytes) -> None:
        self.path = path
        self.entries = entries
        self._dataset, self._chunks, self._name = dataset, chunks, name
        self._file = -1

    @classmethod
    def open(cls, name: Path | str) -> ImportanceMatrix:
        """Index a file and check all its numbers. Its name goes into the quantized file, as it was given.

        Raises `ModelFileError` for anything that is damaged, and `StorageError` if the file can't be read.
        """
        path, raw_name = Path(name).expanduser(), os.fsencode(name)
        try:
            with path.open("rb") as file:
                read = _from_gguf if file.read(len(MAGIC)) == MAGIC else _from_legacy
                entries, dataset, chunks = read(path, file.fileno())
                for tensor, entry in entries.items():
                    _check_numbers(path, file.fileno(), tensor, entry)
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
        return cls(path, entries, dataset, chunks, raw_name)

    @property
    def keys(self) -> dict[str, Value]:
        """The keys that llama-quantize adds to the file, in its order."""
        keys = {"quantize.imatrix.file": Value(ValueType.STRING, self._name[:_KEY_BYTES])}
        if self._dataset is not None:
            keys["quantize.imatrix.dataset"] = Value(ValueType.STRING, self._dataset[:_KEY_BYTES])
        keys["quantize.imatrix.entries_count"] = Value(ValueType.UINT32, len(self.entries))
        if self._chunks > 0:
            keys["quantize.imatrix.chunks_count"] = Value(ValueType.UINT32, self._chunks)
        return keys

    def fits(self, tensor: PlannedTensor) -> bool:
        """Tell whether there is an entry of the tensor's size."""
        entry = self.entries.get(tensor.spec.name)
        return entry is not None and entry.values == tensor.spec.row_weights * _experts(tensor)

    def columns(self, tensor: PlannedTensor, expert: int) -> NDArray[np.float32] | None:
        """Return how much each weight of an expert's rows matters (1 if never seen), or None without an entry."""
        if not self.fits(tensor):
            return None
        entry, width = self.entries[tensor.spec.name], tensor.spec.row_weights
        count = entry.counts[expert * len(entry.counts) // _experts(tensor)]
        if count == 0:
            return np.ones(width, dtype=np.float32)
        sums = _numbers(self.path, self._file, entry.offset + 4 * expert * width, width)
        return sums / np.float32(count)

    def __enter__(self) -> Self:
        """Open the file."""
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        os.close(self._file)
        self._file = -1


def check_importance(tensors: Sequence[PlannedTensor], matrix: ImportanceMatrix | None) -> None:
    """Make sure that a matrix is this model's, and that the types that need one have it.

    Raises `UsageError`, or `ModelFileError` that names the tensor whose entry has another size.
    """
    quantized = [tensor for tensor in tensors if tensor.type_name not in _UNQUANTIZED and not tensor.spec.stored_type]
    for tensor in quantized:
        name, type_name = tensor.spec.name, tensor.type_name
        if matrix is not None and matrix.fits(tensor):
            continue
        if matrix is not None and name in matrix.entries and name not in _EMBEDDINGS:
            raise ModelFileError(
                f"{matrix.path}: {matrix.entries[name].values} numbers for {name}, which needs "
                f"{tensor.spec.row_weights * _experts(tensor)}: it is another model's importance matrix"
            )
        if type_name in _NEVER_WITHOUT or (type_name in NEEDS_IMPORTANCE and name not in _MAY_LACK):
            where = "--imatrix is missing" if matrix is None else f"{matrix.path} has none"
            raise UsageError(f"{name} needs an importance matrix to be {type_name}: {where}", param="imatrix")
    if matrix is not None and not any(matrix.fits(tensor) for tensor in quantized):
        raise ModelFileError(f"{matrix.path}: holds nothing for this model's tensors")


def _experts(tensor: PlannedTensor) -> int:
    return tensor.spec.shape[-3] if len(tensor.spec.shape) >= 3 else 1


def _from_gguf(path: Path, file: int) -> tuple[dict[str, Entry], bytes | None, int]:
    header = read_header(path)
    lacking = [key for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE) if key not in header.metadata]
    if lacking:
        raise _refused(path, f"it lacks the key {lacking[0]}; llama-imatrix makes one")
    datasets, chunks = header.metadata[DATASETS], header.metadata[CHUNK_COUNT]
    if header.types[CHUNK_COUNT] is not ValueType.UINT32 or header.types[DATASETS] is not ValueType.ARRAY:
        raise _refused(path, "its keys have other types than expected")
    dataset = datasets[0].encode(errors="surrogateescape") if datasets and isinstance(datasets[0], str) else None
    return _gguf_entries(path, file, header), dataset, chunks if chunks < 1 << 31 else 0


def _gguf_entries(path: Path, file: int, header: Header) -> dict[str, Entry]:
    found: Mapping[str, dict[str, TensorInfo]] = {SUMS: {}, COUNTS: {}}
    for tensor in header.tensors:
        for suffix, tensors in found.items():
            if tensor.name.endswith(suffix):
                tensors[tensor.name.removesuffix(suffix)] = tensor
    if alone := found[SUMS].keys() ^ found[COUNTS].keys():
        raise _refused(path, f"sums without counts, or counts without sums, for {min(alone)!r}")
    if not found[SUMS]:
        raise _refused(path, "it has no entries")
    entries = {}
    for name, sums in found[SUMS].items():
        counts = found[COUNTS][name]
        values, experts = sums.nbytes // 4, counts.nbytes // 4
        if (sums.type_name, counts.type_name) != ("f32", "f32") or experts > _MOST_EXPERTS or values % experts:
            raise _refused(path, f"sums {sums.shape} and counts {counts.shape} of {name!r} do not belong together")
        read = _numbers(path, file, header.data_offset + counts.offset, experts)
        if not (np.isfinite(read).all() and (read >= 0).all() and (read < 1 << 31).all()):
            raise _refused(path, f"counts of {name!r} that are no counts")
        rounded = np.floor(read.astype(np.float64) + 0.5)
        entries[name] = Entry(header.data_offset + sums.offset, values, tuple(int(count) for count in rounded))
    return entries


def _from_legacy(path: Path, file: int) -> tuple[dict[str, Entry], bytes | None, int]:
    size = os.fstat(file).st_size
    position = 0

    def take(count: int, what: str) -> bytes:
        nonlocal position
        if not 0 <= count <= size - position:
            raise _refused(path, f"{what} needs {count} bytes at {position} of {size}")
        data = os.pread(file, count, position)
        position += len(data)
        return data

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    entries: dict[str, Entry] = {}
    wanted = number("the number of entries")
    if not 0 < wanted <= _MOST_ENTRIES:
        raise _refused(path, "neither a GGUF nor the older format of llama-imatrix")
    for _ in range(wanted):
        length = number("a name's length")
        if not 0 < length <= _MOST_NAME_BYTES:
            raise _refused(path, f"a name of {length} bytes at {position}")
        name = take(length, "a name").partition(b"\0")[0].decode(errors="surrogateescape")
        calls, values = number("a count"), number("a length")
        if values < 1 or 4 * values > size - position:
            raise _refused(path, f"{values} numbers for {name!r} at byte {position} of {size}")
        entries[name] = Entry(position, values, (max(calls, 0) or 1,))  # without calls they are no sums
        position += 4 * values
    chunks = number("the number of chunks") if size - position >= 4 else 0
    dataset = None
    if size - position >= 4:
        length = number("the length of the data set's name")
        if 0 < length <= size - position:
            dataset = take(min(length, _KEY_BYTES), "the data set's name").partition(b"\0")[0]
    return entries, dataset, chunks


def _numbers(path: Path, file: int, offset: int, count: int) -> NDArray[np.float32]:
    numbers = np.empty(count, dtype=np.float32)
    if os.preadv(file, [numbers.view(np.uint8).data], offset) != numbers.nbytes:
        raise _refused(path, f"truncated while it was read, at byte {offset}")
    return numbers


def _check_numbers(path: Path, file: int, name: str, entry: Entry) -> None:
    for first in range(0, entry.values, _AT_ONCE):
        numbers = _numbers(path, file, entry.offset + 4 * first, min(_AT_ONCE, entry.values - first))
        if not np.isfinite(numbers).all() or (numbers < 0).any():
            raise _refused(path, f"sums of squares of {name!r} that are negative or no numbers")


def _refused(path: Path, why: str) -> ModelFileError:
    return ModelFileError(f"{path}: not a usable importance matrix: {why}")
