"""Checkpoints whose weights are quantized already: each method turns them into plain F32 weights while they are read.

The numbers are those of upstream's converter before it rounds them to bf16: products of exact f32 numbers, each rounded
once to f32. They are never all in memory, and never on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.errors import CheckpointError
from quantize.checkpoint import Checkpoint, StoredTensor
from quantize.dequantize import methods
from quantize.source import Source

Decode = Callable[[Path, Mapping[str, StoredTensor], Mapping[str, Any]], dict[str, StoredTensor]]

# `quant_method` of config.json → what shows plain weights in place of what is stored
METHODS: dict[str, Decode] = {
    "fp8": methods.fp8,
    "fbgemm_fp8": methods.scaled_weights,
    "modelopt": methods.modelopt,
    "gptq": methods.gptq_layers,
    "compressed-tensors": methods.compressed_tensors,
    "mxfp4": methods.as_stored,  # gpt-oss: its family moves the bits as they are
}
_INSTEAD = "give the revision of the model that is not quantized (bf16 or f16), or one in a format that is read: "
_REFUSED = {
    "awq": "AWQ packs weights in the order of its own kernels, which is not read",
    "bitsandbytes": "bitsandbytes stores weights as codes of its own code books, which are not read",
}


def decode(checkpoint: Checkpoint, source: Source) -> None:
    """Replace the quantized tensors of an indexed checkpoint by plain ones. Reads no weight.

    Raises `CheckpointError` for a method that is not read, saying what to do instead, and for tensors that are missing
    or contradict each other.
    """
    path = source.folder / "config.json"
    stated = source.config
    if isinstance(stated.get("text_config"), dict):
        stated = {**stated, **stated["text_config"]}
    settings = stated.get("quantization_config")
    if not settings:
        return
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: quantization_config is {settings!r}; an object was expected")
    method = str(settings.get("quant_method")).lower()
    if method not in METHODS:
        known = ", ".join(METHODS)
        why = _REFUSED.get(method, f"`quant_method` {settings.get('quant_method')!r} is not read")
        raise CheckpointError(f"{path}: the weights are quantized already: {why}; {_INSTEAD}{known}")
    checkpoint.tensors = METHODS[method](path, checkpoint.tensors, settings)
