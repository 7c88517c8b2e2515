"""What quantizing costs each tensor: the root mean square of what changed, relative to that of the weights."""

from __future__ import annotations

import collections
import math

import numpy as np
from numpy.typing import NDArray

from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.slabs import Slab, Workspace


class Losses:
    """Sums over the slabs of one file, which come from several threads in any order: the result does not depend on it.

    A tensor of which nothing was told has lost nothing.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)

    def take(self, slab: Slab, exact: NDArray[np.float32], encoded: NDArray[np.uint8], space: Workspace) -> None:
        """Compare a slab's weights with what its bytes in the file stand for."""
        found = _decoded(slab.tensor.type_name, encoded, exact.size, space)
        changed = space.array("changed", np.float32, exact.size)
        np.subtract(found, exact, out=changed)
        np.square(changed, out=changed)
        lost = float(changed.sum(dtype=np.float64))
        np.square(exact, out=changed)
        self._sums[slab.tensor.spec.name].append((lost, float(changed.sum(dtype=np.float64))))

    def relative_error(self, name: str) -> float | None:
        """Return a tensor's error: 0.01 is one percent. None if all its weights are 0 and the file's are not."""
        sums = self._sums.get(name, [])
        lost, whole = (math.fsum(pair[place] for pair in sums) for place in (0, 1))
        if lost == 0:
            return 0.0
        return math.sqrt(lost / whole) if whole else None


def _decoded(type_name: str, encoded: NDArray[np.uint8], count: int, space: Workspace) -> NDArray[np.float32]:
    if type_name == "f32":
        return encoded.view(np.float32)
    values = space.array("found", np.float32, count)
    if type_name == "bf16":
        quantizer.bf16_to_f32(encoded.view(np.uint16), values)
    elif type_name == "f16":
        quantizer.f16_to_f32(encoded.view(np.uint16), values)
    else:
        quantizer.decode_rows(TENSOR_TYPE_NUMBERS[type_name], encoded, values)
    return values
