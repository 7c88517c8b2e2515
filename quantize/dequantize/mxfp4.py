"""MXFP4 as compressed-tensors packs it: two numbers of 4 bits in a byte, a power of two for every 32 of them."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from quantize.checkpoint import Checkpoint, DecodedTensor, StoredTensor
from quantize.dequantize.values import blockwise, read_rows, read_scales, unpack

GROUP = 32

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class Mxfp4:
    """Number × power of two, exact in f32."""

    packed: StoredTensor
    scale: StoredTensor

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The numbers and their scales."""
        return (self.packed, self.scale)

    def decode(self, checkpoint: Checkpoint, first: int, out: NDArray[np.float32]) -> None:
        """Fill rows, counted over all axes but the last."""
        codes = unpack(read_rows(checkpoint, self.packed, first, len(out)), 4)
        np.take(_E2M1, codes, out=out, mode="clip")
        view, spread = blockwise(out, read_scales(checkpoint, self.scale, first, len(out)), GROUP)
        np.multiply(view, spread, out=view)


def mxfp4(packed: StoredTensor, scale: StoredTensor) -> DecodedTensor:
    """Return the weights that packed numbers and their scales stand for.

    Raises `CheckpointError` that names the tensors if their types or shapes do not go together.
    """
    shape = (*packed.shape[:-1], 2 * packed.shape[-1]) if packed.shape else ()
    wanted = (*shape[:-1], shape[-1] // GROUP) if shape else ()
    fits = len(shape) > 1 and not shape[-1] % GROUP and scale.shape == wanted and 0 not in shape
    if packed.dtype != "U8" or scale.dtype not in {"U8", "F8_E8M0"} or not fits:
        raise CheckpointError(
            f"{packed.shard}: the tensor {packed.name!r} ({packed.dtype}, {packed.shape}) with the scales "
            f"{scale.name!r} ({scale.dtype}, {scale.shape}) is not MXFP4: U8, with a scale for every {GROUP} weights"
        )
    return DecodedTensor(packed.name, "F32", shape, packed.shard, 0, packed.nbytes + scale.nbytes, Mxfp4(packed, scale))
