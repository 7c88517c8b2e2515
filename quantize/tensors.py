"""What a family says about each tensor of the GGUF that it makes. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Change = Callable[[NDArray[np.float32]], None]
"""Changes weights in place, whatever their shape."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Consecutive rows of a target that come from one stored tensor.

    The stored tensor is read as rows of `width` weights, from row `start` on, whatever its own shape. Without `take`
    the rows keep their order. With it the stored rows come in groups of `group`, and of each the rows `take` are taken,
    in that order: a permutation within heads, or every other row. `columns` does the same with the weights of a row.
    `changes` are applied to the numbers, one after the other, before they are rounded to any type: in f32, but in f16
    to what is stored in f16, as upstream does.

    With `stride`, the other way round: what is stored from there on are `width` lines of `stride` weights, and the rows
    are its columns. With `scales`, the weights are MXFP4, two in a byte of the source; a byte of the tensor `scales` is
    the exponent of 32. They are moved as they are.
    """

    source: str
    rows: int
    width: int
    start: int = 0
    group: int = 1
    take: NDArray[np.intp] | None = None
    columns: NDArray[np.intp] | None = None
    changes: tuple[Change, ...] = ()
    stride: int = 0
    scales: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the stored tensors that it comes from."""
        return (self.source,) if self.scales is None else (self.source, self.scales)

    @property
    def unit(self) -> int:
        """How many rows of the target come from one group."""
        return 1 if self.take is None else len(self.take)

    def stored_rows(self, rows: int) -> int:
        """Return how many stored rows must be read for so many rows of the target, a multiple of `unit`."""
        return rows // self.unit * self.group


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor to be written.

    `name` is its name in the GGUF, `shape` is in numpy's order (rows first). Its weights are those of `parts`, one
    after the other, or the F32 bytes in `data`. `keep_f32` is for what is never stored in 16 bits: see `always_f32`.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    data: bytes | None = None
    keep_f32: bool = False

    @property
    def stored_type(self) -> str | None:
        """The type that its weights have in the checkpoint already, bit for bit; None if they are plain numbers."""
        return "mxfp4" if any(part.scales for part in self.parts) else None

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def row_weights(self) -> int:
        """How many numbers one row holds."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.weights // self.shape[-1]


_ALWAYS_F32 = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "token_types", "ssm_conv1d", "shortconv.conv")


def always_f32(name: str, dimensions: int) -> bool:
    """Tell whether upstream's converter stores a tensor of the GGUF in F32, whatever the type of the file."""
    if dimensions <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight"):
        return True
    stem = name.removesuffix(".weight")
    return (stem.split(".", 2)[2] if stem.startswith("blk.") else stem) in _ALWAYS_F32


def rope_pairs(head: int) -> NDArray[np.intp]:
    """Return the order of a head's rows in ggml, which wants rotary pairs side by side.

    Hugging Face keeps the first halves of a head's pairs, then the second halves.
    """
    return np.arange(head).reshape(2, head // 2).T.ravel()


def plus_one(weights: NDArray[np.float32]) -> None:
    """Add 1: the norms of Gemma and others are stored as what they add to 1."""
    weights += 1


def negative_exp(weights: NDArray[np.float32]) -> None:
    """Turn the logarithm of a decay into what the decay is multiplied with, each rounded to the nearest f32.

    torch leaves the last bit to the processor and its library: upstream's is another one in 1% of numbers.
    """
    with np.errstate(over="ignore"):  # infinity is refused, by the tensor's name, where it is looked for
        np.negative(np.exp(weights.astype(np.float64)), out=weights, casting="same_kind")
