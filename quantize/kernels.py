"""Turns slabs of rows into the bytes of the file: read, put in order, widen, check, encode.

A slab is small enough that its weights stay in the processor's cache from one step to the next. All steps let go of the
GIL, so that slabs run side by side on threads, each with a `Workspace` of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.checkpoint import Checkpoint, DecodedTensor, StoredTensor
from quantize.importance import ImportanceMatrix
from quantize.mxfp4 import BLOCK_BYTES, BLOCK_WEIGHTS, fill_blocks
from quantize.plan import PlannedTensor
from quantize.tensors import Change, Part

SLAB_WEIGHTS = 1 << 17
_STRIDED_SLAB_WEIGHTS = 1 << 20  # so that enough of each line is read at once

_F16, _BF16, _F32 = "F16", "BF16", "F32"
_EXPONENTS: dict[str, tuple[Any, int]] = {  # all ones: infinity or not a number
    _F16: (np.uint16, 0x7C00),
    _BF16: (np.uint16, 0x7F80),
    _F32: (np.uint32, 0x7F800000),
}


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


def slabs_of(tensor: PlannedTensor) -> Iterator[Slab]:
    """Cut a tensor into slabs: whole rows, and whole groups where rows change places within a group.

    A part whose rows are shorter than the tensor's is not cut, for only the whole of it ends where a row does.
    """
    if not tensor.spec.parts:
        yield Slab(tensor, None, 0, 0, tensor.spec.rows)
    first_weight = 0
    for part in tensor.spec.parts:
        weights = _STRIDED_SLAB_WEIGHTS if part.stride else SLAB_WEIGHTS
        rows = max(1, weights // (part.unit * part.width)) * part.unit
        if part.width < tensor.spec.row_weights:
            rows = part.rows
        for first in range(0, part.rows, rows):
            yield Slab(tensor, part, first_weight + first * part.width, first, min(rows, part.rows - first))
        first_weight += part.rows * part.width


class Workspace:
    """The buffers of one slab on its way; they grow to the largest slab and are used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, dtype: Any, count: int) -> NDArray[Any]:
        """Return an uninitialised array of `count` numbers, the same memory at each call with this name."""
        nbytes = count * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[name] = np.empty(nbytes, dtype=np.uint8)
        return buffer[:nbytes].view(dtype)


def encode(
    slabs: Sequence[Slab],
    checkpoint: Checkpoint,
    space: Workspace,
    *,
    through_bf16: Sequence[bool],
    importance: ImportanceMatrix | None = None,
) -> list[NDArray[np.uint8]]:
    """Return the bytes of the same rows for each of the files that are made, valid until the workspace is used again.

    `slabs` are those rows in each file's own tensor; they are read and widened once. `through_bf16` says for each file
    whether it rounds to bf16 before quantizing, as upstream's intermediate file does. Raises `CheckpointError` that
    names the tensor if a weight is NaN or infinite, or does not fit into a type. `importance` says how much each column
    matters; ggml uses it for most of its quantized types.
    """
    part = slabs[0].part
    if part is None:
        return [np.frombuffer(slab.tensor.spec.data or b"", dtype=np.uint8) for slab in slabs]
    if part.scales is not None:
        return [_moved(slabs[0], part, part.scales, checkpoint, space)] * len(slabs)
    stored = checkpoint.tensors[part.source]
    exact: _Weights | None = None
    rounded: _Weights | None = None
    encoded = []
    for place, (slab, rounds) in enumerate(zip(slabs, through_bf16, strict=True)):
        if isinstance(stored, DecodedTensor) and stored.block_type == slab.tensor.type_name:
            encoded.append(_copied(slab, stored, checkpoint, space.array(f"out {place}", np.uint8, slab.nbytes)))
            continue
        exact = exact or _load(slab, part, checkpoint, space)
        weights = exact
        if rounds and not slab.tensor.spec.keep_f32 and exact.dtype != _BF16:
            if rounded is None:
                rounded = _Weights(_narrow(exact.f32(), _BF16, space, slab, "rounded"), _BF16, space, "rounded f32")
            weights = rounded
        encoded.append(_as_type(weights, slab, space, place, importance))
    return encoded


class _Weights:
    """A slab's weights, and the same in f32: they are widened when that is first needed."""

    def __init__(self, raw: NDArray[Any], dtype: str, space: Workspace, buffer: str) -> None:
        self.raw, self.dtype, self._space, self._buffer = raw, dtype, space, buffer
        self._f32: NDArray[np.float32] | None = None

    def f32(self) -> NDArray[np.float32]:
        if self._f32 is None:
            self._f32 = _widen(self.raw, self.dtype, self._space, self._buffer)
        return self._f32


def _load(slab: Slab, part: Part, checkpoint: Checkpoint, space: Workspace) -> _Weights:
    stored = checkpoint.tensors[part.source]
    raw, dtype = _read(slab, part, stored, checkpoint, space), stored.dtype
    _check_finite(raw, dtype, space, f"{stored.shard}: the tensor {stored.name!r} holds NaN or infinite weights")
    if part.change is not None:
        raw, dtype = _changed(part.change, raw, dtype, space, slab), _F32
    return _Weights(raw, dtype, space, "values")


def _as_type(
    weights: _Weights, slab: Slab, space: Workspace, place: int, importance: ImportanceMatrix | None
) -> NDArray[np.uint8]:
    target = slab.tensor.type_name.upper()
    if weights.dtype == target:
        return weights.raw.view(np.uint8)
    values = weights.f32()
    if target == _F32:
        return values.view(np.uint8)
    if target in {_BF16, _F16}:
        return _narrow(values, target, space, slab, f"out {place}").view(np.uint8)
    out = space.array(f"out {place}", np.uint8, slab.nbytes)
    number = TENSOR_TYPE_NUMBERS[slab.tensor.type_name]
    rows = values.reshape(-1, slab.tensor.spec.row_weights)
    if importance is None or not importance.fits(slab.tensor):
        quantizer.encode_rows(number, rows, out)
    else:
        encoded = out.reshape(len(rows), -1)
        for first, end, expert in _by_expert(slab, len(rows)):
            columns = importance.columns(slab.tensor, expert)
            quantizer.encode_rows(number, rows[first:end], encoded[first:end], columns)
    if not quantizer.is_valid(number, out):
        raise CheckpointError(_too_large(slab))
    return out


def _by_expert(slab: Slab, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield where in the slab the rows of an expert begin and end, and its number."""
    shape = slab.tensor.spec.shape
    first_row = slab.first_weight // shape[-1]
    each = shape[-2] if len(shape) >= 3 else slab.tensor.spec.rows
    first = 0
    while first < rows:
        expert, row = divmod(first_row + first, each)
        end = min(rows, first + each - row)
        yield first, end, expert
        first = end


def _read(slab: Slab, part: Part, stored: StoredTensor, checkpoint: Checkpoint, space: Workspace) -> NDArray[Any]:
    dtype = _EXPONENTS[stored.dtype][0]
    if part.stride:
        raw = _read_columns(slab, part, stored, dtype, checkpoint, space)
    else:
        raw = _read_rows(slab, part, stored, part.width, dtype, checkpoint, space)
    if part.columns is not None:
        ordered = space.array("ordered", raw.dtype, slab.weights)
        shape = (-1, part.width)
        np.take(raw.reshape(shape), part.columns, axis=1, mode="clip", out=ordered.reshape(shape))
        raw = ordered
    return raw


def _read_rows(
    slab: Slab, part: Part, stored: StoredTensor, width: int, dtype: Any, checkpoint: Checkpoint, space: Workspace
) -> NDArray[Any]:
    """Read the slab's rows, each of `width` items."""
    raw = space.array(f"rows of {dtype.__name__}", dtype, part.stored_rows(slab.rows) * width)
    first = part.start + part.stored_rows(slab.first_row)
    checkpoint.read_into(stored, first * width * raw.itemsize, raw.view(np.uint8).data)
    return _taken(slab, part, raw, width, space)


def _read_columns(
    slab: Slab, part: Part, stored: StoredTensor, dtype: Any, checkpoint: Checkpoint, space: Workspace
) -> NDArray[Any]:
    """Read the slab's rows, which are columns of what is stored."""
    columns = part.stored_rows(slab.rows)
    lines = space.array("lines", dtype, part.width * columns).reshape(part.width, columns)
    first = part.start * part.width + part.stored_rows(slab.first_row)
    for number, line in enumerate(lines):
        checkpoint.read_into(stored, (first + number * part.stride) * lines.itemsize, line.view(np.uint8).data)
    raw = space.array(f"rows of {dtype.__name__}", dtype, lines.size)
    raw.reshape(columns, part.width)[:] = lines.T
    return _taken(slab, part, raw, part.width, space)


def _taken(slab: Slab, part: Part, raw: NDArray[Any], width: int, space: Workspace) -> NDArray[Any]:
    if part.take is None:
        return raw
    taken = space.array(f"taken of {raw.dtype}", raw.dtype, slab.rows * width)
    out = taken.reshape(-1, part.unit, width)
    np.take(raw.reshape(-1, part.group, width), part.take, axis=1, mode="clip", out=out)
    return taken


def _copied(slab: Slab, stored: DecodedTensor, checkpoint: Checkpoint, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Read a slab that is stored in the type that the file wants."""
    checkpoint.read_into(stored.origins[0], slab.offset, out.data)
    if not quantizer.is_valid(TENSOR_TYPE_NUMBERS[slab.tensor.type_name], out):
        raise CheckpointError(f"{stored.shard}: the tensor {stored.name!r} holds NaN or infinite weights")
    return out


def _moved(slab: Slab, part: Part, scales: str, checkpoint: Checkpoint, space: Workspace) -> NDArray[np.uint8]:
    """Return the blocks of a slab whose weights are MXFP4 already."""
    exponents = checkpoint.tensors[scales]
    codes = _read_rows(slab, part, checkpoint.tensors[part.source], part.width // 16, np.uint64, checkpoint, space)
    powers = _read_rows(slab, part, exponents, part.width // BLOCK_WEIGHTS, np.uint8, checkpoint, space)
    out = space.array("out", np.uint8, slab.nbytes)
    fill_blocks(out.reshape(-1, BLOCK_BYTES), codes.reshape(-1, 2), powers)
    if not quantizer.is_valid(TENSOR_TYPE_NUMBERS["mxfp4"], out):
        raise CheckpointError(f"{exponents.shard}: the tensor {exponents.name!r} holds scales that are not a number")
    return out


def _changed(change: Change, raw: NDArray[Any], dtype: str, space: Workspace, slab: Slab) -> NDArray[Any]:
    values = _widen(raw, dtype, space)
    change(values)
    _check_finite(values.view(np.uint32), _F32, space, _too_large(slab))
    if dtype == _F16:  # upstream changes weights in f16, but bf16 ones in f32
        values = _widen(_narrow(values, _F16, space, slab, "rounded"), _F16, space)
    return values.view(np.uint32)


def _check_finite(raw: NDArray[Any], dtype: str, space: Workspace, complaint: str) -> None:
    unsigned, exponent = _EXPONENTS[dtype]
    exponents = space.array("exponents", unsigned, raw.size)
    np.bitwise_and(raw, unsigned(exponent), out=exponents)
    if exponents.max() == exponent:
        raise CheckpointError(complaint)


def _widen(raw: NDArray[Any], dtype: str, space: Workspace, buffer: str = "values") -> NDArray[np.float32]:
    if dtype == _F32:
        return raw.view(np.float32)
    values = space.array(buffer, np.float32, raw.size)
    (quantizer.bf16_to_f32 if dtype == _BF16 else quantizer.f16_to_f32)(raw, values)
    return values


def _narrow(values: NDArray[np.float32], dtype: str, space: Workspace, slab: Slab, buffer: str) -> NDArray[np.uint16]:
    narrow = space.array(buffer, np.uint16, values.size)
    (quantizer.f32_to_bf16 if dtype == _BF16 else quantizer.f32_to_f16)(values, narrow)
    _check_finite(narrow, dtype, space, _too_large(slab))
    return narrow


def _too_large(slab: Slab) -> str:
    name = slab.part.source if slab.part else slab.tensor.spec.name
    return f"the tensor {name!r} holds weights that are too large for {slab.tensor.type_name}; choose another type"
