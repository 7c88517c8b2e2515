"""What a family says about each tensor of the GGUF that it makes. Pure."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor to be written.

    `name` is its name in the GGUF, `shape` is in numpy's order (rows first). Its weights are those of the checkpoint's
    tensor `source`, or the F32 bytes in `data`. `rope_heads` undoes Hugging Face's ordering of rotary pairs within so
    many heads. `keep_f32` is for what is never stored in 16 bits: norms, and anything with one dimension.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None = None
    data: bytes | None = None
    rope_heads: int | None = None
    keep_f32: bool = False

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
