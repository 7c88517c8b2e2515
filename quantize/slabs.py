"""Cuts tensors into slabs of rows, and reads what is stored of one.

A slab is small enough that its weights stay near the processor from one step to the next, and large enough that what
Python does for each is little: four times smaller ones take a quarter longer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.checkpoint import Checkpoint, StoredTensor, Wanted
from quantize.plan import PlannedTensor
from quantize.tensors import Part

SLAB_WEIGHTS = 1 << 19
STRIDED_SLAB_WEIGHTS = 1 << 20  # so that enough of each line is read at once

_BITS: dict[str, Any] = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}


@dataclasses.dataclass(frozen=True, slots=True)
class Slab:
    """Some consecutive rows of a tensor, all from one of its parts.

    `first_weight` counts within the tensor; `first_row` and `rows` within the part, in rows of its own width. A tensor
    whose bytes are known from the start is one slab without a part.
    """

    tensor: PlannedTensor
    part: Part | None
    first_weight: int
    first_row: int
    rows: int

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return self.rows * self.part.width if self.part else self.tensor.spec.weights

    @property
    def offset(self) -> int:
        """Where it begins within the tensor's bytes."""
        return self.first_weight // self.tensor.spec.row_weights * self.tensor.row_bytes if self.first_weight else 0

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in the file."""
        return self.weights // self.tensor.spec.row_weights * self.tensor.row_bytes

    @property
    def is_last(self) -> bool:
        """Whether it ends the tensor."""
        return self.first_weight + self.weights == self.tensor.spec.weights


def slabs_of(tensor: PlannedTensor, wanted: Wanted = lambda _: True) -> Iterator[Slab]:
    """Cut the wanted parts of a tensor into slabs: whole rows, whole groups where rows change places within a group.

    A part whose rows are shorter than the tensor's is not cut, for only the whole of it ends where a row does.
    """
    if not tensor.spec.parts and wanted(None):
        yield Slab(tensor, None, 0, 0, tensor.spec.rows)
    first_weight = 0
    for part in tensor.spec.parts:
        weights = STRIDED_SLAB_WEIGHTS if part.stride else SLAB_WEIGHTS
        rows = max(1, weights // (part.unit * part.width)) * part.unit
        if part.width < tensor.spec.row_weights:
            rows = part.rows
        for first in range(0, part.rows, rows) if wanted(part) else ():
            yield Slab(tensor, part, first_weight + first * part.width, first, min(rows, part.rows - first))
        first_weight += part.rows * part.width


class Workspace:
    """The buffers of one slab on its way; they grow to the largest slab and are used again.

    Slabs that are made of the same stored rows have a workspace each, its twins, and what was read in common.
    """

    def __init__(self, reads: Workspace | None = None) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}
        self._reads = reads
        self._contents: dict[str, Hashable] = {}
        self._twins: list[Workspace] = []

    def forget(self) -> None:
        """Read anew from now on: what was read for one slab may have been changed on the way."""
        self._contents.clear()

    def twin(self, number: int) -> Workspace:
        """Return the workspace of a twin; number 0 is this one."""
        while len(self._twins) < number:
            self._twins.append(Workspace(self))
        return self._twins[number - 1] if number else self

    def read(
        self, name: str, dtype: Any, count: int, content: Hashable, fill: Callable[[NDArray[Any]], None]
    ) -> NDArray[Any]:
        """Return an array of `count` numbers with what `fill` puts there, unless a twin has read that `content`."""
        if self._reads is not None:
            return self._reads.read(name, dtype, count, content, fill)
        out = self.array(name, dtype, count)
        if self._contents.get(name) != content:
            self._contents.pop(name, None)
            fill(out)
            self._contents[name] = content
        return out

    def array(self, name: str, dtype: Any, count: int) -> NDArray[Any]:
        """Return an uninitialised array of `count` numbers, the same memory at each call with this name."""
        nbytes = count * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[name] = np.empty(nbytes, dtype=np.uint8)
        return buffer[:nbytes].view(dtype)


def read_weights(
    slab: Slab, part: Part, stored: StoredTensor, checkpoint: Checkpoint, space: Workspace
) -> NDArray[Any]:
    """Read the slab's weights and put them in order; returns their bits, unsigned integers of their size."""
    dtype = _BITS[stored.dtype]
    if part.stride:
        raw = _read_columns(slab, part, stored, dtype, checkpoint, space)
    else:
        raw = read_rows(slab, part, stored, part.width, dtype, checkpoint, space)
    if part.columns is not None:
        ordered = space.array("ordered", raw.dtype, slab.weights)
        shape = (-1, part.width)
        np.take(raw.reshape(shape), part.columns, axis=1, mode="clip", out=ordered.reshape(shape))
        raw = ordered
    return raw


def read_rows(
    slab: Slab, part: Part, stored: StoredTensor, width: int, dtype: Any, checkpoint: Checkpoint, space: Workspace
) -> NDArray[Any]:
    """Read the slab's rows, each of `width` items of a numpy type."""
    count = part.stored_rows(slab.rows) * width
    first = (part.start + part.stored_rows(slab.first_row)) * width

    def fill(raw: NDArray[Any]) -> None:
        checkpoint.read_into(stored, first * raw.itemsize, raw.view(np.uint8).data)

    raw = space.read(f"rows of {dtype.__name__}", dtype, count, (stored.name, first, count), fill)
    return _taken(slab, part, raw, width, space)


def _read_columns(
    slab: Slab, part: Part, stored: StoredTensor, dtype: Any, checkpoint: Checkpoint, space: Workspace
) -> NDArray[Any]:
    """Read the slab's rows, which are columns of what is stored."""
    columns = part.stored_rows(slab.rows)
    count = part.width * columns
    first = part.start * part.width + part.stored_rows(slab.first_row)

    def fill(raw: NDArray[Any]) -> None:
        lines = space.array("lines", dtype, count).reshape(part.width, columns)
        for number, line in enumerate(lines):
            checkpoint.read_into(stored, (first + number * part.stride) * lines.itemsize, line.view(np.uint8).data)
        raw.reshape(columns, part.width)[:] = lines.T

    raw = space.read(f"rows of {dtype.__name__}", dtype, count, (stored.name, first, columns, part.stride), fill)
    return _taken(slab, part, raw, part.width, space)


def _taken(slab: Slab, part: Part, raw: NDArray[Any], width: int, space: Workspace) -> NDArray[Any]:
    if part.take is None:
        return raw
    taken = space.array(f"taken of {raw.dtype}", raw.dtype, slab.rows * width)
    out = taken.reshape(-1, part.unit, width)
    np.take(raw.reshape(-1, part.group, width), part.take, axis=1, mode="clip", out=out)
    return taken
