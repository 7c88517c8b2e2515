"""Weights of 8 bits, fp8 or int8, of which blocks share a scale: a whole tensor, a row, or a rectangle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from quantize.checkpoint import Checkpoint, DecodedTensor, StoredTensor
from quantize.dequantize.values import FLOATS_OF_8_BITS, SCALE_DTYPES, blockwise, read_rows, read_scales, table_of

_WEIGHT_DTYPES = (*FLOATS_OF_8_BITS, "I8")


@dataclasses.dataclass(frozen=True, slots=True)
class Scaled:
    """Weight × scale in f32, rounded once. `block` says how many weights along each axis share a scale.

    `zero`, if there is one, has the scale's shape, and is subtracted first.
    """

    weight: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None
    block: tuple[int, ...]

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The weights and what belongs to them."""
        return (self.weight, self.scale) if self.zero is None else (self.weight, self.scale, self.zero)

    def decode(self, checkpoint: Checkpoint, first: int, out: NDArray[np.float32]) -> None:
        """Fill rows, counted over all axes but the last."""
        raw = read_rows(checkpoint, self.weight, first, len(out))
        np.take(table_of(self.weight.dtype), raw, out=out, mode="clip")
        rows = self._scale_rows(first, len(out))
        low, count = int(rows.min()), int(np.ptp(rows)) + 1
        width = -(-out.shape[1] // self.block[-1])
        if self.zero is not None:
            zeros = table_of("I8")[read_rows(checkpoint, self.zero, low, count, width)][rows - low]
            view, spread = blockwise(out, zeros, self.block[-1])
            np.subtract(view, spread, out=view)
        scales = read_scales(checkpoint, self.scale, low, count, width)
        view, spread = blockwise(out, scales[rows - low], self.block[-1])
        np.multiply(view, spread, out=view)

    def _scale_rows(self, first: int, count: int) -> NDArray[np.intp]:
        """Return for each row of weights which row of scales it takes."""
        axes = self.weight.shape[:-1]
        places = np.unravel_index(np.arange(first, first + count), axes)
        found = np.zeros(count, dtype=np.intp)
        for place, size, block in zip(places, axes, self.block, strict=False):
            found = found * -(-size // block) + place // block
        return found


def scaled(
    weight: StoredTensor,
    scale: StoredTensor,
    *,
    zero: StoredTensor | None = None,
    blocks: Iterable[tuple[int, ...] | None] = (None,),
) -> DecodedTensor:
    """Return the weights that a tensor and its scales stand for.

    `blocks` are sizes of blocks along the last axes, as config.json says them: the first that the shapes go with is
    taken. For None the shapes alone must say it: along each axis there is one scale, or one for each weight. Raises
    `CheckpointError` that names the tensor whose type or shape is impossible.
    """
    if weight.dtype not in _WEIGHT_DTYPES or len(weight.shape) < 2 or not math.prod(weight.shape):
        raise CheckpointError(
            f"{weight.shard}: the tensor {weight.name!r} has scales ({scale.name!r}), but is {weight.dtype} of shape "
            f"{weight.shape}; matrices of {', '.join(_WEIGHT_DTYPES)} were expected"
        )
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.shard}: the tensor {scale.name!r} is {scale.dtype}; scales are {', '.join(SCALE_DTYPES)}"
        )
    if zero is not None and (zero.dtype != "I8" or zero.shape != scale.shape):
        raise CheckpointError(
            f"{zero.shard}: the tensor {zero.name!r} is {zero.dtype} of shape {zero.shape}; I8 of {scale.shape} was "
            "expected"
        )
    blocks = tuple(blocks)
    block = next((found for stated in blocks if (found := _block(weight.shape, scale.shape, stated))), None)
    if block is None:
        of = "" if None in blocks else f" in blocks of {' or '.join(map(str, blocks))}"
        raise CheckpointError(
            f"{scale.shard}: the tensor {scale.name!r} has the shape {scale.shape}, which does not go with "
            f"{weight.name!r} of shape {weight.shape}{of}"
        )
    decoder = Scaled(weight, scale, zero, block)
    nbytes = sum(origin.nbytes for origin in decoder.origins)
    return DecodedTensor(weight.name, "F32", weight.shape, weight.shard, 0, nbytes, decoder)


def _block(shape: tuple[int, ...], scale: tuple[int, ...], stated: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return how many weights share a scale along each axis, or None if the shapes do not go together."""
    if stated is not None:
        block = (*(1 for _ in shape[len(stated) :]), *stated)
        counts = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
        return block if scale == counts else None
    counts = (*scale, *(1 for _ in shape[len(scale) :]))
    if len(counts) != len(shape) or any(count not in {1, size} for count, size in zip(counts, shape, strict=True)):
        return None
    return tuple(size if count == 1 else 1 for count, size in zip(counts, shape, strict=True))
