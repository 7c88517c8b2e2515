"""Quantize a plain checkpoint of a Llama-like model as other tools publish them, for tests and comparisons.

    python scripts/quantized_checkpoint.py CHECKPOINT --method M --out DIR

The matrices of the layers are quantized, embeddings and norms stay as they are; config.json says what real models say.
numpy only. Scales are chosen by the largest weight of a block: good enough to compare readers with.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from checkpoint_writer import encode, whole_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = np.ndarray[Any, Any]
    Stored = dict[str, tuple[str, Array]]  # name → dtype as safetensors names it, and its bits

_MATRIX = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$")
_LARGEST_E4M3 = 448.0
_BLOCK = 128


def read_checkpoint(folder: Path) -> Stored:
    """Return every tensor of a folder's safetensors: f32 numbers of the BF16 ones."""
    tensors: Stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {name} is {entry['dtype']}; BF16 was expected")
            begin, end = entry["data_offsets"]
            bits = np.frombuffer(content[start + begin : start + end], dtype="<u2").astype("<u4") << 16
            tensors[name] = ("BF16", bits.view("<f4").reshape(entry["shape"]))
    return tensors


def e4m3_table() -> Array:
    """Return the 127 numbers from 0 on that a byte of fp8 (e4m3, no infinities) can be, in ascending order."""
    return np.array(
        [(code % 8) * 2.0**-9 if code < 8 else (8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(127)]
    )


def to_e4m3(values: Array) -> Array:
    """Round to the nearest fp8; returns its bytes."""
    table = e4m3_table()
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, np.abs(values)).astype(np.uint8)
    return codes | (np.signbit(values).astype(np.uint8) << 7)


def blocks_of(values: Array, rows: int, columns: int) -> Array:
    """Return the largest magnitude of each block; those at the edges may be smaller."""
    height, width = (-(-values.shape[0] // rows), -(-values.shape[1] // columns))
    padded = np.zeros((height * rows, width * columns), dtype=np.float32)
    padded[: values.shape[0], : values.shape[1]] = np.abs(values)
    largest: Array = padded.reshape(height, rows, width, columns).max(axis=(1, 3))
    return largest


def spread(scales: Array, rows: int, columns: int, shape: tuple[int, ...]) -> Array:
    """Repeat each block's scale for all of its weights."""
    return np.repeat(np.repeat(scales, rows, 0), columns, 1)[: shape[0], : shape[1]]


def rounded(scales: Array, dtype: str) -> Array:
    """Return scales as the numbers that they are once stored in BF16, F16 or F32."""
    bits = encode(scales, dtype)
    return (bits.astype("<u4") << 16).view("<f4") if dtype == "BF16" else bits.astype(np.float32)


def fp8(values: Array, rows: int, columns: int, dtype: str) -> tuple[Array, Array]:
    """Return fp8 bytes and the scales of blocks, which are numbers of `dtype`."""
    scales = rounded(blocks_of(values, rows, columns) / np.float32(_LARGEST_E4M3), dtype)
    return to_e4m3(values / spread(scales, rows, columns, values.shape)), scales


def integers(values: Array, bits: int, group: int, *, zero_points: bool) -> tuple[Array, Array, Array]:
    """Return levels from 0 on (rows, columns), scales (F16) and zero points (rows, groups) of groups along the rows."""
    grouped = values.reshape(len(values), -1, group)
    top = (1 << bits) - 1
    if zero_points:
        low, high = np.minimum(grouped.min(2), 0), np.maximum(grouped.max(2), 0)
        scales = rounded((high - low) / np.float32(top), "F16")
        zeros = np.clip(np.rint(-low / scales), 0, top)
    else:
        scales = rounded(np.abs(grouped).max(2) / np.float32(top // 2), "F16")
        zeros = np.full(scales.shape, 1 << (bits - 1))
    levels = np.clip(np.rint(grouped / scales[:, :, None]) + zeros[:, :, None], 0, top)
    return levels.reshape(values.shape).astype(np.uint32), scales, zeros.astype(np.uint32)


def pack(levels: Array, bits: int) -> Array:
    """Pack levels of a row into words of 32 bits, the first lowest; the last word is filled with zeros."""
    in_a_word = 32 // bits
    padded = np.zeros((len(levels), -(-levels.shape[1] // in_a_word) * in_a_word), dtype=np.uint32)
    padded[:, : levels.shape[1]] = levels
    shifted = padded.reshape(len(levels), -1, in_a_word) << (bits * np.arange(in_a_word, dtype=np.uint32))
    words: Array = np.bitwise_or.reduce(shifted, axis=2)
    return words.view(np.int32)


def fp8_block(name: str, values: Array) -> Stored:
    """As DeepSeek and Qwen publish fp8."""
    codes, scales = fp8(values, _BLOCK, _BLOCK, "BF16")
    return {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("BF16", scales)}


def fp8_tensor(name: str, values: Array) -> Stored:
    """As Mistral publishes fp8: one scale for a tensor, and one for its activations, which nobody needs here."""
    codes, scales = fp8(values, *values.shape, "BF16")
    activation = f"{name.removesuffix('.weight')}.activation_scale"
    ones = np.ones((), dtype=np.float32)
    return {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("BF16", scales.reshape(())), activation: ("BF16", ones)}


def modelopt_fp8(name: str, values: Array) -> Stored:
    """As NVIDIA publishes fp8."""
    codes, scales = fp8(values, *values.shape, "F32")
    ones = np.ones((), dtype=np.float32)
    inputs = f"{name.removesuffix('.weight')}.input_scale"
    return {name: ("F8_E4M3", codes), f"{name}_scale": ("F32", scales.reshape(())), inputs: ("F32", ones)}


def ct_fp8_channel(name: str, values: Array) -> Stored:
    """As vLLM's compressor writes fp8: a scale for each row."""
    codes, scales = fp8(values, 1, values.shape[1], "BF16")
    return {name: ("F8_E4M3", codes), f"{name}_scale": ("BF16", scales)}


def ct_fp8_block(name: str, values: Array) -> Stored:
    """As vLLM's compressor writes fp8: a scale for each block."""
    codes, scales = fp8(values, _BLOCK, _BLOCK, "F32")
    return {name: ("F8_E4M3", codes), f"{name}_scale": ("F32", scales)}


def ct_int8(name: str, values: Array) -> Stored:
    """As vLLM's compressor writes int8: a scale for each row."""
    scales = rounded(np.abs(values).max(1, keepdims=True) / np.float32(127), "BF16")
    codes = np.clip(np.rint(values / scales), -128, 127).astype(np.int8)
    return {name: ("I8", codes), f"{name}_scale": ("BF16", scales)}


def ct_int4(name: str, values: Array, *, zero_points: bool = False) -> Stored:
    """As vLLM's compressor packs int4: groups of 128 weights of a row, or of 32 with zero points."""
    levels, scales, zeros = integers(values, 4, 32 if zero_points else _BLOCK, zero_points=zero_points)
    stored: Stored = {
        f"{name}_packed": ("I32", pack(levels, 4)),
        f"{name}_scale": ("BF16", rounded(scales, "BF16")),
        f"{name}_shape": ("I64", np.array(values.shape, dtype=np.int64)),
    }
    if zero_points:
        stored[f"{name}_zero_point"] = ("I32", np.ascontiguousarray(pack(zeros.T, 4).T))
    return stored


def ct_int4_zero(name: str, values: Array) -> Stored:
    """As vLLM's compressor packs int4 with zero points."""
    return ct_int4(name, values, zero_points=True)


def gptq(name: str, values: Array, *, bits: int, zero_offset: int = 1, shuffled: bool = False) -> Stored:
    """As AutoGPTQ writes it: groups of 128 inputs, which `shuffled` picks from all over the row (`desc_act`)."""
    columns = values.shape[1]
    groups = np.arange(columns) // _BLOCK
    if shuffled:
        groups = np.random.default_rng(columns).permutation(groups)
    order = np.argsort(groups, kind="stable")
    levels, scales, zeros = integers(values[:, order], bits, _BLOCK, zero_points=True)
    zeros = np.maximum(zeros, zero_offset) - zero_offset
    unordered = np.empty_like(levels)
    unordered[:, order] = levels
    base = name.removesuffix(".weight")
    return {
        f"{base}.g_idx": ("I32", groups.astype(np.int32)),
        f"{base}.qweight": ("I32", np.ascontiguousarray(pack(unordered, bits).T)),
        f"{base}.qzeros": ("I32", pack(zeros.T, bits)),
        f"{base}.scales": ("F16", np.ascontiguousarray(scales.T)),
    }


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "group_size": None, **weights}
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


def _gptq_settings(bits: int, form: str = "gptq", *, desc_act: bool = False) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": _BLOCK, "desc_act": desc_act, "sym": False,
        "damp_percent": 0.1, "lm_head": False, "checkpoint_format": form, "true_sequential": True,
    }  # fmt: skip


# name → what it makes of a matrix, and quantization_config
METHODS: dict[str, tuple[Callable[[str, Array], Stored], dict[str, Any]]] = {
    "fp8-block": (
        fp8_block,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]},
    ),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "modelopt-fp8": (modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": None}),
    "ct-fp8-channel": (ct_fp8_channel, _compressed("float-quantized", strategy="channel")),
    "ct-fp8-block": (
        ct_fp8_block, _compressed("float-quantized", strategy="block", block_structure=[_BLOCK, _BLOCK])
    ),
    "ct-int8": (ct_int8, _compressed("int-quantized", type="int", strategy="channel")),
    "ct-int4": (ct_int4, _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=_BLOCK)),
    "ct-int4-zero": (
        ct_int4_zero,
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
    ),
    "gptq-4": (lambda *matrix: gptq(*matrix, bits=4), _gptq_settings(4)),
    "gptq-4-act": (lambda *matrix: gptq(*matrix, bits=4, shuffled=True), _gptq_settings(4, desc_act=True)),
    "gptq-2": (lambda *matrix: gptq(*matrix, bits=2), _gptq_settings(2)),
    "gptq-8-v2": (lambda *matrix: gptq(*matrix, bits=8, zero_offset=0), _gptq_settings(8, "gptq_v2")),
}  # fmt: skip


def quantize_checkpoint(source: Path, out: Path, method: str) -> None:
    """Write the whole folder, in two shards: helpers are in other shards than the weights that they belong to."""
    quantize, settings = METHODS[method]
    tensors: Stored = {}
    for name, (dtype, values) in read_checkpoint(source).items():
        tensors |= quantize(name, values) if _MATRIX.match(name) else {name: (dtype, values)}
    helpers = {name for name in tensors if not name.endswith((".weight", "_packed", ".qweight"))}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with whole_folder(out) as folder:
        for path in source.iterdir():
            if path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
                shutil.copy(path, folder)
        write_json(folder / "config.json", config | {"quantization_config": settings})
        weight_map: dict[str, str] = {}
        for number, names in enumerate((sorted(set(tensors) - helpers), sorted(helpers)), 1):
            shard = f"model-{number:05d}-of-00002.safetensors"
            _write_shard(folder / shard, {name: tensors[name] for name in names})
            weight_map |= dict.fromkeys(names, shard)
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_shard(path: Path, tensors: Stored) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[bytes] = []
    offset = 0
    for name, (dtype, values) in tensors.items():
        data = (encode(values, dtype) if dtype in {"BF16", "F16", "F32"} else np.ascontiguousarray(values)).tobytes()
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        pieces.append(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    quantize_checkpoint(arguments.checkpoint, arguments.out, arguments.method)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
