"""Integers of few bits packed into words of 32, as compressed-tensors writes them: `pack-quantized`."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from quantize.checkpoint import Checkpoint, DecodedTensor, StoredTensor
from quantize.dequantize.values import SCALE_DTYPES, blockwise, read_rows, read_scales, unpack


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """How a group of config.json packs weights: bits of each, and how many in a row share a scale (None: all)."""

    bits: int
    group: int | None

    def columns(self, packed: StoredTensor, scale: StoredTensor) -> int | None:
        """Return how many weights a row has, or None if the tensors' shapes do not go with this scheme."""
        if len(packed.shape) != 2 or len(scale.shape) != 2 or packed.shape[0] != scale.shape[0]:
            return None
        in_a_word = 32 // self.bits
        columns = packed.shape[1] * in_a_word if self.group is None else scale.shape[1] * self.group
        if -(-columns // in_a_word) != packed.shape[1] or (self.group is None and scale.shape[1] != 1):
            return None
        return columns


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """(Level − offset) × scale in f32, rounded once; the offset is the zero point, or half of the levels' range.

    Levels are packed along a row, zero points along a column. `order` gives each column its group where the groups are
    not simply one after the other.
    """

    packed: StoredTensor
    scale: StoredTensor
    shape: StoredTensor | None
    zero: StoredTensor | None
    order: StoredTensor | None
    scheme: Scheme
    columns: int

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The levels and what belongs to them."""
        every = (self.packed, self.scale, self.shape, self.zero, self.order)
        return tuple(tensor for tensor in every if tensor is not None)

    def decode(self, checkpoint: Checkpoint, first: int, out: NDArray[np.float32]) -> None:
        """Fill rows."""
        if first == 0 and self.shape is not None:
            self._check_shape(checkpoint, self.shape)
        levels = unpack(read_rows(checkpoint, self.packed, first, len(out)), self.scheme.bits)
        out[:] = levels[:, : self.columns]
        group = self.scheme.group or self.columns
        order = None if self.order is None else self._read_order(checkpoint, self.order)
        if self.zero is None:
            out -= np.float32(1 << (self.scheme.bits - 1))
        else:
            self._apply(np.subtract, out, self._zeros(checkpoint, self.zero, first, len(out)), group, order)
        self._apply(np.multiply, out, read_scales(checkpoint, self.scale, first, len(out)), group, order)

    @staticmethod
    def _apply(
        operation: np.ufunc, out: NDArray[np.float32], values: NDArray[np.float32], group: int,
        order: NDArray[np.intp] | None,
    ) -> None:  # fmt: skip
        view, spread = blockwise(out, values, group) if order is None else (out, values[:, order])
        operation(view, spread, out=view)

    def _zeros(self, checkpoint: Checkpoint, zero: StoredTensor, first: int, count: int) -> NDArray[np.float32]:
        in_a_word = 32 // self.scheme.bits
        low, high = first // in_a_word, -(-(first + count) // in_a_word)
        words = read_rows(checkpoint, zero, low, high - low).view(np.uint32)
        down = np.ascontiguousarray(words.T).view(np.uint8)
        levels = unpack(down, self.scheme.bits).T[first - low * in_a_word :][:count]
        return levels.astype(np.float32)

    def _read_order(self, checkpoint: Checkpoint, tensor: StoredTensor) -> NDArray[np.intp]:
        order: NDArray[np.int32] = read_rows(checkpoint, tensor, 0, 1).view(np.int32)[0]
        if order.min() < 0 or order.max() >= self.scale.shape[1]:
            raise CheckpointError(
                f"{tensor.shard}: the tensor {tensor.name!r} names groups from {order.min()} to {order.max()}; there "
                f"are {self.scale.shape[1]}"
            )
        return order.astype(np.intp)

    def _check_shape(self, checkpoint: Checkpoint, tensor: StoredTensor) -> None:
        raw = read_rows(checkpoint, tensor, 0, 1)
        stated = tuple(raw.view(np.int64 if tensor.dtype == "I64" else np.int32)[0].tolist())
        if stated != (self.packed.shape[0], self.columns):
            raise CheckpointError(
                f"{tensor.shard}: the tensor {tensor.name!r} says {stated}; levels and scales have the shape "
                f"{(self.packed.shape[0], self.columns)}"
            )


def packed(
    levels: StoredTensor,
    scale: StoredTensor,
    schemes: tuple[Scheme, ...],
    *,
    shape: StoredTensor | None = None,
    zero: StoredTensor | None = None,
    order: StoredTensor | None = None,
) -> DecodedTensor:
    """Return the weights that packed levels stand for, by the one of the schemes that the shapes go with.

    Raises `CheckpointError` that names the tensor whose type or shape is impossible.
    """
    fitting = {(scheme, columns) for scheme in schemes if (columns := scheme.columns(levels, scale))}
    if levels.dtype != "I32" or scale.dtype not in SCALE_DTYPES or len(fitting) != 1 or not levels.shape[0]:
        raise CheckpointError(
            f"{levels.shard}: the tensor {levels.name!r} ({levels.dtype}, {levels.shape}) with the scales "
            f"{scale.name!r} ({scale.dtype}, {scale.shape}) fits {len(fitting) or 'none'} of config.json's groups"
        )
    scheme, columns = fitting.pop()
    rows = levels.shape[0]
    for helper, dtypes, wanted in (
        (shape, {"I64", "I32"}, (2,)),
        (zero, {"I32"}, (-(-rows // (32 // scheme.bits)), scale.shape[1])),
        (order, {"I32"}, (columns,)),
    ):
        if helper is not None and (helper.dtype not in dtypes or helper.shape != wanted):
            raise CheckpointError(
                f"{helper.shard}: the tensor {helper.name!r} is {helper.dtype} of shape {helper.shape}; "
                f"{' or '.join(sorted(dtypes))} of {wanted} was expected"
            )
    decoder = Packed(levels, scale, shape, zero, order, scheme, columns)
    nbytes = sum(origin.nbytes for origin in decoder.origins)
    return DecodedTensor(levels.name, "F32", (rows, columns), levels.shard, 0, nbytes, decoder)
