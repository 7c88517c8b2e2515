"""GPTQ: integers of 2, 4 or 8 bits packed along the inputs, the columns of a weight; `g_idx` gives each its group.

Rows of weights are columns of what is stored, so that a few of them lie scattered over the whole tensor. Bands of many
rows are read at once, and kept for the slabs that follow, within a limit of bytes for the whole model.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from quantize.checkpoint import Checkpoint, DecodedTensor, StoredTensor
from quantize.dequantize.values import SCALE_DTYPES, blockwise, item_bytes, read_rows, to_f32, unpack

BITS = (2, 4, 8)

_BAND_BYTES = 8 << 20
_KEPT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Band:
    """Consecutive rows of a weight: `words` u32 (rows, words of a row), zeros and scales f32 (rows, groups)."""

    words: NDArray[np.uint32]
    zeros: NDArray[np.float32]
    scales: NDArray[np.float32]
    groups: NDArray[np.intp] | int
    """The group of each column, or how many columns side by side make one."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.words.nbytes + self.zeros.nbytes + self.scales.nbytes


class Bands:
    """The bands that were read last; those that several threads ask for are read once."""

    def __init__(self, limit: int = _KEPT_BYTES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[Hashable, concurrent.futures.Future[Band]] = collections.OrderedDict()

    def get(self, key: Hashable, read: Callable[[], Band]) -> Band:
        """Return the band of a key, from `read` if it is not here."""
        with self._lock:
            future = self._kept.get(key)
            mine = future is None
            if future is None:
                future = self._kept[key] = concurrent.futures.Future()
            self._kept.move_to_end(key)
        if mine:
            try:
                future.set_result(read())
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._kept.pop(key, None)
            self._trim()
        return future.result()

    def _trim(self) -> None:
        with self._lock:
            sizes = {key: future.result().nbytes for key, future in self._kept.items() if _is_there(future)}
            total = sum(sizes.values())
            for key in list(sizes)[:-1]:
                if total <= self._limit:
                    return
                total -= sizes[key]
                del self._kept[key]


def _is_there(future: concurrent.futures.Future[Band]) -> bool:
    return future.done() and future.exception() is None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Gptq:
    """Scale × (level − zero) in f32, rounded once.

    Levels are stored as (inputs / levels of a word, outputs), scales as (groups, outputs), zeros as (groups, outputs /
    levels of a word), `zero_offset` too small; the weight is (outputs, inputs).
    """

    levels: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None
    bits: int
    zero_offset: int
    bands: Bands

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The levels and what belongs to them."""
        every = (self.levels, self.zeros, self.scales, self.g_idx)
        return tuple(tensor for tensor in every if tensor is not None)

    @property
    def band_rows(self) -> int:
        """How many rows are read at once, whole words of zeros."""
        in_a_word = 32 // self.bits
        return max(1, _BAND_BYTES // (self.levels.shape[0] * 4 * in_a_word)) * in_a_word

    def decode(self, checkpoint: Checkpoint, first: int, out: NDArray[np.float32]) -> None:
        """Fill rows."""
        step, done = self.band_rows, 0
        while done < len(out):
            number, skipped = divmod(first + done, step)
            band = self.bands.get((self, number), functools.partial(self._read, checkpoint, number))
            part = out[done : done + step - skipped]
            rows = slice(skipped, skipped + len(part))
            part[:] = unpack(band.words[rows].view(np.uint8), self.bits)
            for operation, values in ((np.subtract, band.zeros[rows]), (np.multiply, band.scales[rows])):
                if isinstance(band.groups, int):
                    view, spread = blockwise(part, values, band.groups)
                else:
                    view, spread = part, values[:, band.groups]
                operation(view, spread, out=view)
            done += len(part)

    def _read(self, checkpoint: Checkpoint, number: int) -> Band:
        """Read a band, from rows of words to rows of weights."""
        first = number * self.band_rows
        rows = min(self.band_rows, self.levels.shape[1] - first)
        in_a_word = 32 // self.bits
        words = _columns(checkpoint, self.levels, first, rows).view(np.uint32)
        packed = _columns(checkpoint, self.zeros, first // in_a_word, rows // in_a_word)
        zeros = unpack(packed, self.bits).astype(np.float32)
        zeros += np.float32(self.zero_offset)
        scales = to_f32(_columns(checkpoint, self.scales, first, rows), self.scales.dtype)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{self.scales.shard}: the tensor {self.scales.name!r} holds NaN or infinite scales")
        turn = np.ascontiguousarray
        return Band(turn(words.T), turn(zeros.T), turn(scales.T), self._groups(checkpoint))

    def _groups(self, checkpoint: Checkpoint) -> NDArray[np.intp] | int:
        columns, count = self.levels.shape[0] * (32 // self.bits), self.scales.shape[0]
        side_by_side = -(-columns // count)
        if self.g_idx is None:
            return side_by_side
        groups: NDArray[np.int32] = read_rows(checkpoint, self.g_idx, 0, 1).view(np.int32)[0]
        if groups.min() < 0 or groups.max() >= count:
            raise CheckpointError(
                f"{self.g_idx.shard}: the tensor {self.g_idx.name!r} names groups from {groups.min()} to "
                f"{groups.max()}; there are {count}"
            )
        if np.array_equal(groups, np.arange(columns) // side_by_side):
            return side_by_side
        return groups.astype(np.intp)


def _columns(checkpoint: Checkpoint, tensor: StoredTensor, first: int, count: int) -> NDArray[np.uint8]:
    """Return some columns of all rows of a stored tensor, u8 (rows, bytes)."""
    rows, columns = tensor.shape
    if count == columns:
        return read_rows(checkpoint, tensor, 0, rows)
    size = item_bytes(tensor.dtype)
    raw = np.empty((rows, count * size), dtype=np.uint8)
    for row in range(rows):
        checkpoint.read_into(tensor, (row * columns + first) * size, raw[row].data)
    return raw


def gptq(
    levels: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    g_idx: StoredTensor | None,
    *,
    bits: int,
    zero_offset: int,
    bands: Bands,
) -> DecodedTensor:
    """Return the weights that a layer's tensors stand for; `bits` counts where there is no `g_idx` to count columns.

    Raises `CheckpointError` that names the tensor whose type or shape is impossible.
    """
    if g_idx is not None and len(g_idx.shape) == 1 and g_idx.shape[0]:
        bits = 32 * levels.shape[0] // g_idx.shape[0]
    if bits not in BITS:
        raise CheckpointError(
            f"{levels.shard}: the tensor {levels.name!r} holds levels of {bits} bits; "
            f"{', '.join(map(str, BITS))} are read"
        )
    in_a_word = 32 // bits
    columns, rows = levels.shape[0] * in_a_word, levels.shape[-1]
    groups = scales.shape[0] if scales.shape else 0
    for tensor, dtypes, wanted in (
        (levels, ("I32",), (columns // in_a_word, rows)),
        (scales, SCALE_DTYPES, (groups, rows)),
        (zeros, ("I32",), (groups, rows // in_a_word)),
        (g_idx, ("I32",), (columns,)),
    ):
        if tensor is not None and (tensor.dtype not in dtypes or tensor.shape != wanted or 0 in wanted):
            raise CheckpointError(
                f"{tensor.shard}: the tensor {tensor.name!r} is {tensor.dtype} of shape {tensor.shape}; "
                f"{' or '.join(dtypes)} of {wanted} was expected for {levels.name!r} of shape {levels.shape}"
            )
    if rows % in_a_word:
        raise CheckpointError(
            f"{levels.shard}: the tensor {levels.name!r} has {rows} columns, no multiple of {in_a_word}"
        )
    decoder = Gptq(levels, zeros, scales, g_idx, bits, zero_offset, bands)
    nbytes = sum(origin.nbytes for origin in decoder.origins)
    return DecodedTensor(levels.name, "F32", (rows, columns), levels.shard, 0, nbytes, decoder)
