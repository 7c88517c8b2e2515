"""Turns slabs of rows into the bytes of the file: widen, check, change, encode.

All steps let go of the GIL, so that slabs run side by side on threads, each with a `Workspace` of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize import native
from quantize.checkpoint import Checkpoint, DecodedTensor
from quantize.importance import ImportanceMatrix
from quantize.loss import Losses
from quantize.mxfp4 import BLOCK_BYTES, BLOCK_WEIGHTS, fill_blocks
from quantize.slabs import Slab, Workspace, read_rows, read_weights
from quantize.tensors import Change, Part

_MXFP4 = TENSOR_TYPE_NUMBERS["mxfp4"]
_F16, _BF16, _F32 = "F16", "BF16", "F32"
_EXPONENTS: dict[str, tuple[Any, int]] = {  # all ones: infinity or not a number
    _F16: (np.uint16, 0x7C00),
    _BF16: (np.uint16, 0x7F80),
    _F32: (np.uint32, 0x7F800000),
}


def encode(
    slabs: Sequence[Slab],
    checkpoint: Checkpoint,
    space: Workspace,
    *,
    through_bf16: Sequence[bool],
    importance: ImportanceMatrix | None = None,
    losses: Sequence[Losses] = (),
) -> list[NDArray[np.uint8]]:
    """Return the bytes of the same rows for each of the files that are made, valid until the workspace is used again.

    `slabs` are those rows in each file's own tensor; they are read and widened once. `through_bf16` says for each file
    whether it rounds to bf16 before quantizing, as upstream's intermediate file does. Raises `CheckpointError` that
    names the tensor if a weight is NaN or infinite, or does not fit into a type. `importance` says how much each column
    matters; ggml uses it for most of its quantized types. `losses`, one a file if any, hear what is lost.
    """
    part = slabs[0].part
    if part is None:
        return [np.frombuffer(slab.tensor.spec.data or b"", dtype=np.uint8) for slab in slabs]
    if part.scales is not None:
        blocks = _moved(slabs[0], part, part.scales, checkpoint, space)
        again = [_again(blocks, slab, space, place, importance) for place, slab in enumerate(slabs)]
        for slab, data, loss in zip(slabs, again, losses or (), strict=False):
            if data is not blocks:
                loss.take(slab, space.array("decoded", np.float32, slab.weights), data, space)
        return again
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
        if losses:
            losses[place].take(slab, exact.f32(), encoded[-1], space)
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

    def for_encoder(self, tensor_type: int, *, weighted: bool) -> tuple[NDArray[Any], int]:
        """Return weights for the encoder and the number of their type: as they are, where a kernel reads that."""
        source = TENSOR_TYPE_NUMBERS[self.dtype.lower()]
        if self._f32 is None and native.reads(source, tensor_type, weighted=weighted):
            return (self.f32() if self.dtype == _F32 else self.raw), source
        return self.f32(), TENSOR_TYPE_NUMBERS["f32"]


def _load(slab: Slab, part: Part, checkpoint: Checkpoint, space: Workspace) -> _Weights:
    stored = checkpoint.tensors[part.source]
    raw, dtype = read_weights(slab, part, stored, checkpoint, space), stored.dtype
    _check_finite(raw, dtype, space, f"{stored.shard}: the tensor {stored.name!r} holds NaN or infinite weights")
    if part.changes:
        raw, dtype = _changed(part.changes, raw, dtype, space, slab), _F32
    return _Weights(raw, dtype, space, "values")


def _as_type(
    weights: _Weights, slab: Slab, space: Workspace, place: int, importance: ImportanceMatrix | None
) -> NDArray[np.uint8]:
    target = slab.tensor.type_name.upper()
    if weights.dtype == target:
        return weights.raw.view(np.uint8)
    if target == _F32:
        return weights.f32().view(np.uint8)
    if target in {_BF16, _F16}:
        return _narrow(weights.f32(), target, space, slab, f"out {place}").view(np.uint8)
    out = space.array(f"out {place}", np.uint8, slab.nbytes)
    number = TENSOR_TYPE_NUMBERS[slab.tensor.type_name]
    weighted = importance is not None and importance.fits(slab.tensor)
    values, source = weights.for_encoder(number, weighted=weighted)
    rows = values.reshape(-1, slab.tensor.spec.row_weights)
    if importance is None or not weighted:
        native.encode_rows(number, rows, out, source=source)
    else:
        encoded = out.reshape(len(rows), -1)
        for first, end, expert in _by_expert(slab, len(rows)):
            columns = importance.columns(slab.tensor, expert)
            native.encode_rows(number, rows[first:end], encoded[first:end], columns, source)
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


def _copied(slab: Slab, stored: DecodedTensor, checkpoint: Checkpoint, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Read a slab that is stored in the type that the file wants."""
    checkpoint.read_into(stored.origins[0], slab.offset, out.data)
    if not quantizer.is_valid(TENSOR_TYPE_NUMBERS[slab.tensor.type_name], out):
        raise CheckpointError(f"{stored.shard}: the tensor {stored.name!r} holds NaN or infinite weights")
    return out


def _moved(slab: Slab, part: Part, scales: str, checkpoint: Checkpoint, space: Workspace) -> NDArray[np.uint8]:
    """Return the blocks of a slab whose weights are MXFP4 already."""
    exponents = checkpoint.tensors[scales]
    codes = read_rows(slab, part, checkpoint.tensors[part.source], part.width // 16, np.uint64, checkpoint, space)
    powers = read_rows(slab, part, exponents, part.width // BLOCK_WEIGHTS, np.uint8, checkpoint, space)
    out = space.array("blocks", np.uint8, slab.weights // BLOCK_WEIGHTS * BLOCK_BYTES)
    fill_blocks(out.reshape(-1, BLOCK_BYTES), codes.reshape(-1, 2), powers)
    if not quantizer.is_valid(_MXFP4, out):
        raise CheckpointError(f"{exponents.shard}: the tensor {exponents.name!r} holds scales that are not a number")
    return out


def _again(
    blocks: NDArray[np.uint8], slab: Slab, space: Workspace, place: int, importance: ImportanceMatrix | None
) -> NDArray[np.uint8]:
    """Return MXFP4 blocks as they are, or quantized again, as llama.cpp does it: not by way of bf16."""
    if slab.tensor.type_name == "mxfp4":
        return blocks
    values = space.array("decoded", np.float32, slab.weights)
    quantizer.decode_rows(_MXFP4, blocks, values)
    return _as_type(_Weights(values.view(np.uint32), _F32, space, "values"), slab, space, place, importance)


def _changed(changes: tuple[Change, ...], raw: NDArray[Any], dtype: str, space: Workspace, slab: Slab) -> NDArray[Any]:
    values = _widen(raw, dtype, space)
    for change in changes:
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
