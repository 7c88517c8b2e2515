"""From a checkpoint's tensors to those of the GGUF: each wanted one checked, none left over."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from quantize.checkpoint import DTYPE_BYTES, StoredTensor
from quantize.tensors import Change, Part, TensorSpec, always_f32

NOT_WEIGHTS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Want:
    """A tensor of the GGUF and the stored ones that it is made of.

    Each of `sources` has the shape `stored`. The target has `shape`: by default that of the source, or with several
    sources their stack. What is taken of each source, in rows of the target's width, say `start`, `group`, `take`,
    `columns` and `changes`: see `Part`. With several, `start` may say one for each, and a source may come up again. An
    `optional` one may be missing as a whole. `after` names more stored tensors that upstream reads before it writes
    this one. `scales` names the tensor with the exponents of a source whose weights are MXFP4, of shape (...,
    blocks, 16). `parts` says it all, where these words don't suffice.
    """

    target: str
    sources: str | tuple[str, ...]
    stored: tuple[int, ...]
    shape: tuple[int, ...] | None = None
    start: int | tuple[int, ...] = 0
    group: int = 1
    take: NDArray[np.intp] | None = None
    columns: NDArray[np.intp] | None = None
    changes: tuple[Change, ...] = ()
    optional: bool = False
    after: tuple[str, ...] = ()
    scales: str | None = None
    parts: tuple[Part, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors' names."""
        names = (self.sources,) if isinstance(self.sources, str) else self.sources
        return names if self.scales is None else (*names, self.scales)

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape in the GGUF, in numpy's order."""
        if self.shape is not None:
            return self.shape
        return self.stored if isinstance(self.sources, str) else (len(self.sources), *self.stored)

    def spec(self) -> TensorSpec:
        """Return what the pipeline needs to make it."""
        shape = self.target_shape
        return TensorSpec(self.target, shape, self._parts(shape), keep_f32=always_f32(self.target, len(shape)))

    def _parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        if self.parts:
            return self.parts
        names = (self.sources,) if isinstance(self.sources, str) else self.sources
        width = 1 if len(shape) == 1 and self.take is not None else shape[-1]
        rows = math.prod(shape) // width // len(names)
        starts = self.start if isinstance(self.start, tuple) else (self.start,) * len(names)
        return tuple(
            Part(name, rows, width, start, self.group, self.take, self.columns, self.changes, scales=self.scales)
            for name, start in zip(names, starts, strict=True)
        )


def map_tensors(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    wants: Iterable[Want],
    *,
    ignored: Callable[[str], bool] = lambda _: False,
) -> list[TensorSpec]:
    """Return the specs of all that is wanted and there, in upstream's order: as the last of their sources are stored.

    Raises `CheckpointError` that names a tensor that is missing, of another shape or dtype, or that nobody asked for.
    """
    found = [want for want in wants if not want.optional or any(name in stored for name in want.names)]
    missing = list(dict.fromkeys(name for want in found for name in want.names if name not in stored))
    if missing:
        raise CheckpointError(f"{folder}: tensors are missing: {_some(missing)}")
    used = {name for want in found for name in want.names}
    unexpected = [name for name in stored if name not in used and not (name.endswith(NOT_WEIGHTS) or ignored(name))]
    if unexpected:
        raise CheckpointError(f"{folder}: tensors that such a model does not have: {_some(unexpected)}")
    for want in found:
        for name in want.names:
            shape = want.stored[:-1] if name == want.scales else want.stored
            _check(stored[name], shape, tuple(DTYPE_BYTES) if want.scales is None else ("U8",))
    place = {name: index for index, name in enumerate(stored)}
    found.sort(key=lambda want: max(place[name] for name in (*want.names, *want.after) if name in place))
    return [want.spec() for want in found]


def _check(tensor: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.shard}: the tensor {tensor.name!r} has shape {tensor.shape}; config.json asks for {shape}"
        )
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.shard}: the tensor {tensor.name!r} is {tensor.dtype}; read here: {', '.join(dtypes)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
