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

SLAB_WEIGHTS = 1 << 17

_F16, _BF16, _F32 = "F16", "BF16", "F32"
_EXPONENTS: dict[str, tuple[Any, int]] = {  # all ones: infinity or not a number
    _F16: (np.uint16, 0x7C00),
    _BF16: (np.uint16, 0x7F80),
    _F32: (np.uint32, 0x7F800000),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Slab:
    """Some consecutive rows of a tensor."""

    tensor: PlannedTensor
    stored: StoredTensor | None
    first_row: int
    rows: int

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in the file."""
        return self.rows * self.tensor.row_bytes

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return self.rows * self.tensor.spec.row_weights


def slabs_of(tensor: PlannedTensor, stored: StoredTensor | None) -> Iterator[Slab]:
    """Cut a tensor into slabs: whole rows, and whole heads where rows change places within a head."""
    spec = tensor.spec
    unit = spec.rows // spec.rope_heads if spec.rope_heads and len(spec.shape) > 1 else 1
    rows = max(1, SLAB_WEIGHTS // (unit * spec.row_weights)) * unit
    if len(spec.shape) == 1:
        rows = 1
    for first in range(0, spec.rows, rows):
        yield Slab(tensor, stored, first, min(rows, spec.rows - first))


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
    spec, target = slab.tensor.spec, slab.tensor.type_name.upper()
    if slab.stored is None:
        return np.frombuffer(spec.data or b"", dtype=np.uint8)
    dtype = slab.stored.dtype
    raw = _read(slab, slab.stored, checkpoint, space)
    _check_finite(
        raw, dtype, space, f"{slab.stored.shard}: the tensor {slab.stored.name!r} holds NaN or infinite weights"
    )
    if through_bf16 and target != _F32 and dtype != _BF16:
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
    quantizer.encode_rows(number, values.reshape(slab.rows, spec.row_weights), out)
    if not quantizer.is_valid(number, out):
        raise CheckpointError(_too_large(slab))
    return out


def _read(slab: Slab, stored: StoredTensor, checkpoint: Checkpoint, space: Workspace) -> NDArray[Any]:
    spec = slab.tensor.spec
    row_bytes = spec.row_weights * DTYPE_BYTES[stored.dtype]
    buffer = space.array("raw", np.uint8, slab.rows * row_bytes)
    checkpoint.read_into(stored, slab.first_row * row_bytes, buffer.data)
    raw: NDArray[Any] = buffer.view(_EXPONENTS[stored.dtype][0])
    if spec.rope_heads is None:
        return raw
    # Hugging Face keeps the first halves of a head's rotary pairs, then the second halves; ggml wants pairs
    head = (spec.rows if len(spec.shape) > 1 else spec.row_weights) // spec.rope_heads
    row = spec.row_weights if len(spec.shape) > 1 else 1
    paired = space.array("paired", raw.dtype, raw.size)
    np.copyto(paired.reshape(-1, head // 2, 2, row), raw.reshape(-1, 2, head // 2, row).swapaxes(1, 2))
    return paired


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
    name = slab.stored.name if slab.stored else slab.tensor.spec.name
    return f"the tensor {name!r} holds weights that are too large for {slab.tensor.type_name}; choose another type"
