"""Turns slabs of rows into the bytes of the file: read, put in order, widen, check, encode.

A slab is small enough that its weights stay in the processor's cache from one step to the next. All steps let go of the
GIL, so that slabs run side by side on threads, each with a `Workspace` of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.checkpoint import DTYPE_BYTES, Checkpoint, StoredTensor
from quantize.plan import PlannedTensor
from quantize.tensors import Change, Part

SLAB_WEIGHTS = 1 << 17

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
    """Cut a tensor into slabs: whole rows, and whole groups where rows change places within a group."""
    if not tensor.spec.parts:
        yield Slab(tensor, None, 0, 0, tensor.spec.rows)
    first_weight = 0
    for part in tensor.spec.parts:
        rows = max(1, SLAB_WEIGHTS // (part.unit * part.width)) * part.unit
        if len(tensor.spec.shape) == 1:
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


def encode(slab: Slab, checkpoint: Checkpoint, space: Workspace, *, through_bf16: bool) -> NDArray[np.uint8]:
    """Return the slab's bytes, valid until the workspace is used again.

    `through_bf16` rounds to bf16 before quantizing, as upstream's intermediate file does. Raises `CheckpointError` that
    names the tensor if a weight is NaN or infinite, or does not fit into the type.
    """
    spec, part, target = slab.tensor.spec, slab.part, slab.tensor.type_name.upper()
    if part is None:
        return np.frombuffer(spec.data or b"", dtype=np.uint8)
    stored = checkpoint.tensors[part.source]
    raw, dtype = _read(slab, part, stored, checkpoint, space), stored.dtype
    _check_finite(raw, dtype, space, f"{stored.shard}: the tensor {stored.name!r} holds NaN or infinite weights")
    if part.change is not None:
        raw, dtype = _changed(part.change, raw, dtype, space, slab), _F32
    if through_bf16 and not spec.keep_f32 and dtype != _BF16:
        raw, dtype = _narrow(_widen(raw, dtype, space), _BF16, space, slab), _BF16
    if dtype == target:
        return raw.view(np.uint8)
    values = _widen(raw, dtype, space)
    if target == _F32:
        return values.view(np.uint8)
    if target in {_BF16, _F16}:
        return _narrow(values, target, space, slab).view(np.uint8)
    out = space.array("out", np.uint8, slab.nbytes)
    number = TENSOR_TYPE_NUMBERS[slab.tensor.type_name]
    quantizer.encode_rows(number, values.reshape(-1, spec.row_weights), out)
    if not quantizer.is_valid(number, out):
        raise CheckpointError(_too_large(slab))
    return out


def _read(slab: Slab, part: Part, stored: StoredTensor, checkpoint: Checkpoint, space: Workspace) -> NDArray[Any]:
    row_bytes = part.width * DTYPE_BYTES[stored.dtype]
    buffer = space.array("raw", np.uint8, part.stored_rows(slab.rows) * row_bytes)
    checkpoint.read_into(stored, (part.start + part.stored_rows(slab.first_row)) * row_bytes, buffer.data)
    raw: NDArray[Any] = buffer.view(_EXPONENTS[stored.dtype][0])
    if part.take is not None:
        taken = space.array("taken", raw.dtype, slab.weights)
        np.take(
            raw.reshape(-1, part.group, part.width), part.take, axis=1, mode="clip",
            out=taken.reshape(-1, part.unit, part.width),
        )  # fmt: skip
        raw = taken
    if part.columns is not None:
        ordered = space.array("ordered", raw.dtype, slab.weights)
        shape = (-1, part.width)
        np.take(raw.reshape(shape), part.columns, axis=1, mode="clip", out=ordered.reshape(shape))
        raw = ordered
    return raw


def _changed(change: Change, raw: NDArray[Any], dtype: str, space: Workspace, slab: Slab) -> NDArray[Any]:
    values = _widen(raw, dtype, space)
    change(values)
    _check_finite(values.view(np.uint32), _F32, space, _too_large(slab))
    if dtype == _F16:  # upstream changes weights in f16, but bf16 ones in f32
        values = _widen(_narrow(values, _F16, space, slab), _F16, space)
    return values.view(np.uint32)


def _check_finite(raw: NDArray[Any], dtype: str, space: Workspace, complaint: str) -> None:
    unsigned, exponent = _EXPONENTS[dtype]
    exponents = space.array("exponents", unsigned, raw.size)
    np.bitwise_and(raw, unsigned(exponent), out=exponents)
    if exponents.max() == exponent:
        raise CheckpointError(complaint)


def _widen(raw: NDArray[Any], dtype: str, space: Workspace) -> NDArray[np.float32]:
    if dtype == _F32:
        return raw.view(np.float32)
    values = space.array("values", np.float32, raw.size)
    (quantizer.bf16_to_f32 if dtype == _BF16 else quantizer.f16_to_f32)(raw, values)
    return values


def _narrow(values: NDArray[np.float32], dtype: str, space: Workspace, slab: Slab) -> NDArray[np.uint16]:
    narrow = space.array("narrow", np.uint16, values.size)
    (quantizer.f32_to_bf16 if dtype == _BF16 else quantizer.f32_to_f16)(values, narrow)
    _check_finite(narrow, dtype, space, _too_large(slab))
    return narrow


def _too_large(slab: Slab) -> str:
    name = slab.part.source if slab.part else slab.tensor.spec.name
    return f"the tensor {name!r} holds weights that are too large for {slab.tensor.type_name}; choose another type"
