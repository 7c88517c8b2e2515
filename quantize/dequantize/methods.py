"""What each method of quantization calls its tensors, and what its settings in config.json mean.

Every function takes the path of config.json for messages, the stored tensors and `quantization_config`, and returns the
tensors to show: those that were not quantized as they are, the others as plain weights in upstream's order, and none of
the helpers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.errors import CheckpointError
from quantize.checkpoint import StoredTensor
from quantize.dequantize.gptq import BITS, Bands, gptq
from quantize.dequantize.mxfp4 import mxfp4
from quantize.dequantize.packed import Scheme, packed
from quantize.dequantize.scaled import scaled
from quantize.dequantize.values import FLOATS_OF_8_BITS

Stored = Mapping[str, StoredTensor]
Shown = dict[str, StoredTensor]

# scales of activations and of the KV cache: nothing of the weights
_UNUSED = (
    ".activation_scale", "_activation_scale", ".input_scale", ".input_scale_ub", ".input_zero_point", ".output_scale",
    ".output_zero_point", ".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".k_zero_point", ".v_zero_point",
)  # fmt: skip
_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # by how much the stored zero points are too small
_COMPRESSED = ("naive-quantized", "float-quantized", "int-quantized", "pack-quantized", "mxfp4-pack-quantized")


def as_stored(path: Path, stored: Stored, settings: Mapping[str, Any]) -> Shown:  # noqa: ARG001 - as the others
    """Show everything as it is stored: the family knows what it means."""
    return dict(stored)


def fp8(path: Path, stored: Stored, settings: Mapping[str, Any]) -> Shown:
    """Show the weights of checkpoints in fp8: blocks, rows or whole tensors share a `_scale_inv`."""
    block = _sizes(path, "weight_block_size", settings.get("weight_block_size"))
    shown = _used(stored)
    for name in [name for name in shown if name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        shown[weight] = scaled(_one(path, shown, weight, name), shown.pop(name), blocks=(block,))
    return _without_bare(shown, "_scale_inv")


def scaled_weights(path: Path, stored: Stored, settings: Mapping[str, Any]) -> Shown:  # noqa: ARG001 - as the others
    """Show weights that share a `weight_scale` by rows or by whole tensors."""
    shown = _used(stored)
    for name in [name for name in shown if name.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        shown[weight] = scaled(_one(path, shown, weight, name), shown.pop(name))
    return _without_bare(shown, "_scale")


def modelopt(path: Path, stored: Stored, settings: Mapping[str, Any]) -> Shown:
    """Show the weights of ModelOpt's fp8 checkpoints."""
    if settings.get("quant_algo") != "FP8":
        raise CheckpointError(f"{path}: quant_algo is {settings.get('quant_algo')!r}; of modelopt's, FP8 is read")
    return scaled_weights(path, stored, settings)


def gptq_layers(path: Path, stored: Stored, settings: Mapping[str, Any]) -> Shown:
    """Show the weights of GPTQ checkpoints: each layer has `qweight`, `qzeros`, `scales` and mostly `g_idx`."""
    stated = settings.get("checkpoint_format") or "gptq"
    if stated not in _GPTQ_FORMATS:
        known = ", ".join(_GPTQ_FORMATS)
        raise CheckpointError(f"{path}: checkpoint_format is {stated!r}; of GPTQ's, {known} are read")
    bits = settings.get("bits")
    if bits not in BITS:
        raise CheckpointError(f"{path}: bits is {bits!r}; of GPTQ's, {', '.join(map(str, BITS))} are read")
    shown, bands = dict(stored), Bands()
    for name in [name for name in stored if name.endswith(".qweight")]:
        base = name.removesuffix(".qweight")
        levels, g_idx = shown.pop(name), shown.pop(f"{base}.g_idx", None)
        zeros, scales = (_one(path, shown, f"{base}.{helper}", name) for helper in ("qzeros", "scales"))
        del shown[zeros.name], shown[scales.name]
        offset = _GPTQ_FORMATS[stated]
        shown[f"{base}.weight"] = gptq(levels, zeros, scales, g_idx, bits=bits, zero_offset=offset, bands=bands)
    return shown


def compressed_tensors(path: Path, stored: Stored, settings: Mapping[str, Any]) -> Shown:
    """Show the weights of compressed-tensors checkpoints, whose layers may be quantized in different ways."""
    groups = _groups(path, settings)
    schemes = tuple(_scheme(path, group) for group in groups)
    blocks = {_block(path, group) for group in groups}
    shown = _used(stored)
    for name in [name for name in shown if name.endswith(".weight_packed")]:
        weight = name.removesuffix("_packed")
        levels, scale = shown.pop(name), _one(path, shown, f"{weight}_scale", name)
        del shown[scale.name]
        helpers = {each: shown.pop(f"{weight}_{each}", None) for each in ("shape", "zero_point", "g_idx")}
        if levels.dtype == "U8":
            shown[weight] = mxfp4(levels, scale)
            continue
        shape, zero, order = helpers.values()
        shown[weight] = packed(levels, scale, schemes, shape=shape, zero=zero, order=order)
    for name in [name for name in shown if name.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        zero = shown.pop(f"{weight}_zero_point", None)
        shown[weight] = scaled(_one(path, shown, weight, name), shown.pop(name), zero=zero, blocks=blocks)
    return _without_bare(shown, "_scale")


def _groups(path: Path, settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what config.json says of the weights of each group of layers. Refuses what would change their meaning."""
    stated = settings.get("config_groups")
    if not isinstance(stated, dict) or not all(isinstance(group, dict) for group in stated.values()):
        raise CheckpointError(f"{path}: config_groups is {stated!r}; an object of objects was expected")
    overall = settings.get("format")
    for group in stated.values():
        name = group.get("format") or overall
        if name not in _COMPRESSED:
            known = ", ".join(_COMPRESSED)
            raise CheckpointError(f"{path}: the format {name!r} is not read; of compressed-tensors', {known} are")
    sparsity = settings.get("sparsity_config") or {}
    if settings.get("transform_config") or sparsity.get("format", "dense") not in {"dense", None}:
        raise CheckpointError(f"{path}: weights that are transformed or sparse (compressed-tensors) are not read")
    weights = [group["weights"] for group in stated.values() if group.get("weights")]
    if not weights or not all(isinstance(each, dict) for each in weights):
        raise CheckpointError(f"{path}: no group of config_groups says how weights are quantized")
    return weights


def _scheme(path: Path, weights: Mapping[str, Any]) -> Scheme:
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise CheckpointError(f"{path}: num_bits is {bits!r}; 1 to 8 are read")
    if group in {None, -1, 0}:
        return Scheme(bits, None)
    if type(group) is not int or group < 1:
        raise CheckpointError(f"{path}: group_size is {group!r}; a positive integer was expected")
    return Scheme(bits, group)


def _block(path: Path, weights: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return how many weights share a scale, if only config.json says it."""
    stated = weights.get("block_structure")
    if stated is None and (group := _scheme(path, weights).group) is not None:
        return (1, group)
    return _sizes(path, "block_structure", stated.split("x") if isinstance(stated, str) else stated)


def _sizes(path: Path, name: str, stated: Any) -> tuple[int, ...] | None:
    if stated is None:
        return None
    try:
        sizes = tuple(int(size) for size in stated)
    except (TypeError, ValueError):
        sizes = ()
    if len(sizes) != 2 or min(sizes) < 1:
        raise CheckpointError(f"{path}: {name} is {stated!r}; two positive sizes were expected")
    return sizes


def _used(stored: Stored) -> Shown:
    return {name: tensor for name, tensor in stored.items() if not name.endswith(_UNUSED)}


def _one(path: Path, stored: Stored, name: str, because: str) -> StoredTensor:
    if name not in stored:
        raise CheckpointError(f"{path.parent}: the tensor {name!r} is missing; {because!r} belongs to it")
    return stored[name]


def _without_bare(shown: Shown, suffix: str) -> Shown:
    for name, tensor in shown.items():
        if tensor.dtype in FLOATS_OF_8_BITS:
            raise CheckpointError(
                f"{tensor.shard}: the tensor {name!r} is {tensor.dtype}, but has no {name + suffix!r}"
            )
    return shown
