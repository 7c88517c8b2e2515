"""Small quantized checkpoints, and what their weights are, computed in float64 one formula a method.

Codes and scales are random: every bit pattern that a format allows is there. What a weight is, is worked out here from
the formats' definitions, number by number where that is clearer, and shares nothing with the code under test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.quantize.checkpoints import Shape, encode, make_checkpoint, shapes_of, write_safetensors

Array = np.ndarray[Any, Any]
Make = Callable[[str], tuple[Path, dict[str, Array]]]  # from a method to a folder, made once, and its weights
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
Made = tuple[dict[str, tuple[str, Array]], Array]  # suffix of the name → dtype and array; the weights in float64

SHAPE = Shape(layers=1, hidden=128, heads=4, key_heads=2, feed_forward=192)
_MATRICES = ("self_attn.", "mlp.")


def f8(code: int, exponent_bits: int) -> float:
    """Return what a byte of an 8-bit float is worth, by its definition."""
    fraction_bits = 7 - exponent_bits
    sign, bias = (-1.0) ** (code >> 7), (1 << (exponent_bits - 1)) - 1
    exponent, fraction = (code >> fraction_bits) & ((1 << exponent_bits) - 1), code & ((1 << fraction_bits) - 1)
    if exponent == 0:
        return sign * math.ldexp(fraction, 1 - bias - fraction_bits)
    return sign * math.ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits)


E4M3 = np.array([f8(code, 4) for code in range(256)])
E5M2 = np.array([f8(code, 5) for code in range(256)])
FINITE_E4M3 = np.array([code for code in range(256) if code & 0x7F != 0x7F], dtype=np.uint8)
FINITE_E5M2 = np.array([code for code in range(256) if code & 0x7C != 0x7C], dtype=np.uint8)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def scales_of(random: np.random.Generator, shape: tuple[int, ...], dtype: str = "F32") -> Array:
    """Return scales that are numbers of the type, in f32."""
    values = np.exp(random.normal(-6, 1, shape)).astype(np.float32)
    raw = encode(values, dtype)
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(raw, {"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32).reshape(shape)


def each(shape: tuple[int, int], scales: Array, height: int, width: int) -> Array:
    """Return the scale of each weight, looked up one by one."""
    rows, columns = np.indices(shape)
    return np.asarray(scales[rows // height, columns // width], dtype=np.float64)


def fp8_block(random: np.random.Generator, shape: tuple[int, int], dtype: str = "F32") -> Made:
    codes = random.choice(FINITE_E4M3, shape)
    scales = scales_of(random, (-(-shape[0] // 48), -(-shape[1] // 80)), dtype)
    stored = {"weight": ("F8_E4M3", codes), "weight_scale_inv": (dtype, scales)}
    return stored, E4M3[codes] * each(shape, scales, 48, 80)


def fp8_powers(random: np.random.Generator, shape: tuple[int, int]) -> Made:
    codes = random.choice(FINITE_E5M2, shape)
    powers = random.integers(90, 125, (-(-shape[0] // 48), -(-shape[1] // 80))).astype(np.uint8)
    stored = {"weight": ("F8_E5M2", codes), "weight_scale_inv": ("F8_E8M0", powers)}
    return stored, E5M2[codes] * each(shape, 2.0 ** (powers.astype(float) - 127), 48, 80)


def fp8_tensor(random: np.random.Generator, shape: tuple[int, int]) -> Made:
    codes, scale = random.choice(FINITE_E4M3, shape), scales_of(random, (), "BF16")
    stored = {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("BF16", scale)}
    return stored | {"activation_scale": ("BF16", scale)}, E4M3[codes] * float(scale)


def fp8_channel(random: np.random.Generator, shape: tuple[int, int], one: bool = False) -> Made:
    codes, scales = random.choice(FINITE_E4M3, shape), scales_of(random, (1 if one else shape[0], 1))
    stored = {"weight": ("F8_E4M3", codes), "weight_scale": ("F32", scales[0] if one else scales)}
    return stored | {"input_scale": ("F32", scales[0])}, E4M3[codes] * scales.astype(float)


def int8(random: np.random.Generator, shape: tuple[int, int], group: int = 0, zero: bool = False) -> Made:
    codes = random.integers(-128, 128, shape).astype(np.int8)
    count = shape[1] // group if group else 1
    scales = scales_of(random, (shape[0], count), "F16")
    zeros = random.integers(-128, 128, scales.shape).astype(np.int8) * np.int8(zero)
    stored = {"weight": ("I8", codes), "weight_scale": ("F16", scales)}
    width = group or shape[1]
    weights = (codes - each(shape, zeros, 1, width)) * each(shape, scales, 1, width)
    return stored | ({"weight_zero_point": ("I8", zeros)} if zero else {}), weights


def words(levels: Array, bits: int) -> Array:
    """Pack each row of levels into words of 32 bits, with Python's integers."""
    count = 32 // bits
    packed = [
        [
            sum(int(level) << (bits * place) for place, level in enumerate(row[start : start + count]))
            for start in range(0, len(row), count)
        ]
        for row in levels
    ]
    return np.array(packed, dtype=np.uint32).view(np.int32)


def packed(
    random: np.random.Generator, shape: tuple[int, int], bits: int = 4, group: int = 32, zero: bool = False,
    shuffled: bool = False,
) -> Made:  # fmt: skip
    group = group or shape[1]
    levels = random.integers(0, 1 << bits, shape)
    scales = scales_of(random, (shape[0], shape[1] // group), "BF16")
    zeros = random.integers(0, 1 << bits, scales.shape)
    order = np.arange(shape[1]) // group
    if shuffled:
        order = random.permutation(order)
    offsets = zeros if zero else np.full_like(zeros, 1 << (bits - 1))
    stored = {
        "weight_packed": ("I32", words(levels, bits)),
        "weight_scale": ("BF16", scales),
        "weight_shape": ("I64", np.array(shape)),
    }
    if zero:
        stored["weight_zero_point"] = ("I32", np.ascontiguousarray(words(zeros.T, bits).T))
    if shuffled:
        stored["weight_g_idx"] = ("I32", order.astype(np.int32))
    return stored, (levels - offsets[:, order]) * scales[:, order].astype(float)


def gptq(
    random: np.random.Generator, shape: tuple[int, int], bits: int = 4, group: int = 64, offset: int = 1,
    g_idx: str = "plain",
) -> Made:  # fmt: skip
    levels = random.integers(0, 1 << bits, shape)
    scales = scales_of(random, (shape[1] // group, shape[0]), "F16")
    zeros = random.integers(0, 1 << bits, scales.shape)
    order = np.arange(shape[1]) // group
    if g_idx == "shuffled":
        order = random.permutation(order)
    stored = {
        "qweight": ("I32", np.ascontiguousarray(words(levels, bits).T)),
        "qzeros": ("I32", words(zeros, bits)),
        "scales": ("F16", scales),
    }
    if g_idx != "none":
        stored["g_idx"] = ("I32", order.astype(np.int32))
    return stored, (levels - (zeros.T + offset)[:, order]) * scales.T[:, order].astype(float)


def mxfp4(random: np.random.Generator, shape: tuple[int, int]) -> Made:
    codes = random.integers(0, 16, shape).astype(np.uint8)
    powers = random.integers(100, 130, (shape[0], shape[1] // 32)).astype(np.uint8)
    powers[0, 0] = 0  # the smallest, a subnormal number in f32
    stored = {"weight_packed": ("U8", codes[:, ::2] | (codes[:, 1::2] << 4)), "weight_scale": ("U8", powers)}
    return stored, E2M1[codes] * each(shape, 2.0 ** (powers.astype(float) - 127), 1, 32)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """Return the settings of compressed-tensors for one group of layers."""
    group = {"weights": {"num_bits": 8, "type": "int", "group_size": None, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


@dataclass
class Method:
    """How a matrix is made, and what config.json says."""

    make: Callable[..., Made]
    settings: dict[str, Any]
    options: dict[str, Any]


def _method(make: Callable[..., Made], settings: dict[str, Any], **options: Any) -> Method:
    return Method(make, settings, options)


_BLOCKS = {"quant_method": "fp8", "weight_block_size": [48, 80]}
_PACKED = compressed("pack-quantized", num_bits=4, strategy="group", group_size=32)
METHODS: dict[str, Method] = {
    "fp8 blocks": _method(fp8_block, _BLOCKS),
    "fp8 blocks, bf16 scales": _method(fp8_block, _BLOCKS, dtype="BF16"),
    "fp8 blocks, powers of two": _method(fp8_powers, _BLOCKS),
    "fp8 tensors": _method(fp8_tensor, {"quant_method": "fp8"}),
    "fbgemm fp8": _method(fp8_channel, {"quant_method": "fbgemm_fp8"}),
    "modelopt fp8": _method(fp8_channel, {"quant_method": "modelopt", "quant_algo": "FP8"}, one=True),
    "compressed fp8 rows": _method(fp8_channel, compressed("float-quantized", type="float", strategy="channel")),
    "compressed fp8 tensors": _method(
        fp8_channel, compressed("naive-quantized", type="float", strategy="tensor"), one=True
    ),
    "compressed int8 rows": _method(int8, compressed("int-quantized", strategy="channel")),
    "compressed int8 zeros": _method(int8, compressed("int-quantized", strategy="channel"), zero=True),
    "compressed int8 groups": _method(int8, compressed("int-quantized", strategy="group", group_size=32), group=32),
    "packed int4": _method(packed, _PACKED),
    "packed int4 zeros": _method(packed, _PACKED, zero=True),
    "packed int4 shuffled": _method(packed, _PACKED, zero=True, shuffled=True),
    "packed int8": _method(
        packed, compressed("pack-quantized", strategy="group", group_size=64), bits=8, group=64, zero=True
    ),
    "packed int4 rows": _method(packed, compressed("pack-quantized", num_bits=4, strategy="channel"), group=0),
    "packed int3": _method(
        packed, compressed("pack-quantized", num_bits=3, strategy="group", group_size=64), bits=3, group=64, zero=True
    ),
    "mxfp4": _method(mxfp4, compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32)),
    "gptq 4": _method(gptq, {"quant_method": "gptq", "bits": 4}),
    "gptq 4 shuffled": _method(gptq, {"quant_method": "gptq", "bits": 4, "desc_act": True}, g_idx="shuffled"),
    "gptq 4 without g_idx": _method(gptq, {"quant_method": "gptq", "bits": 4}, g_idx="none"),
    "gptq 2": _method(gptq, {"quant_method": "gptq", "bits": 2}, bits=2),
    "gptq 8": _method(gptq, {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq"}, bits=8),
    "gptq 4 v2": _method(gptq, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, offset=0),
}  # fmt: skip


def make_quantized(folder: Path, name: str) -> dict[str, Array]:
    """Write a quantized checkpoint, and beside it, as `plain`, what its weights are in F32.

    Returns the weights in float64, by the name that they have in a plain checkpoint.
    """
    make_checkpoint(folder, SHAPE)
    config = json.loads((folder / "config.json").read_text())
    random = np.random.default_rng(list(name.encode()))
    method, stored, weights = METHODS[name], {}, {}
    plain: Tensors = {}
    for tensor, shape in shapes_of(SHAPE, config["vocab_size"]).items():
        if any(part in tensor for part in _MATRICES) and len(shape) == 2:
            made, weights[tensor] = method.make(random, shape, **method.options)
            base = tensor.removesuffix("weight")
            stored |= {f"{base}{suffix}": _raw(*content) for suffix, content in made.items()}
            plain[tensor] = _raw("F32", weights[tensor])
        else:
            stored[tensor] = plain[tensor] = _raw("BF16", random.standard_normal(shape))
    write_safetensors(folder / "model.safetensors", stored)
    twin = folder.parent / "plain" / folder.name
    make_checkpoint(twin, SHAPE)
    write_safetensors(twin / "model.safetensors", plain)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method.settings}))
    return weights


def _raw(dtype: str, values: Array) -> tuple[str, tuple[int, ...], bytes]:
    data = encode(values, dtype) if dtype in {"BF16", "F16", "F32"} else values.tobytes()
    return dtype, values.shape, data


def set_settings(folder: Path, value: Any) -> None:
    """Let config.json say this of the quantization."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
