"""Says which parts of a checkpoint do not go into the GGUF. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from quantize.checkpoint import StoredTensor
from quantize.families.mapping import NOT_WEIGHTS
from quantize.tensors import TensorSpec

_PART = re.compile(r"(?:model\.|language_model\.)*(layers\.\d+|[^.]+)")


def left_out(stored: Mapping[str, StoredTensor], specs: Iterable[TensorSpec]) -> list[str]:
    """Return a line for each part of the model that no tensor of the GGUF is made of: its name, tensors and bytes.

    A part is what the names begin with, without a leading `model.`: `vision_tower`, `lm_head`, `layers.48`.
    """
    used = {name for spec in specs for part in spec.parts for name in part.sources}
    parts: dict[str, list[StoredTensor]] = {}
    for name, tensor in stored.items():
        if name not in used and not name.endswith(NOT_WEIGHTS):
            match = _PART.match(name)
            parts.setdefault(match[1] if match else name, []).append(tensor)
    return [
        f"left out: {part} ({len(tensors)} tensor{'s' * (len(tensors) > 1)}, "
        f"{sum(tensor.nbytes for tensor in tensors):,} bytes)"
        for part, tensors in sorted(parts.items())
    ]
