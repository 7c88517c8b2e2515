"""Reads stored numbers of any small type as f32, exactly. Eight bits are looked up in a table of 256 entries."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from quantize.checkpoint import Checkpoint, StoredTensor

FLOATS_OF_8_BITS = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", *FLOATS_OF_8_BITS)

_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I64": 8}


@functools.cache
def table_of(dtype: str) -> NDArray[np.float32]:
    """Return what each byte stands for, f32 (256,), for a type of 8 bits as safetensors names it."""
    codes = np.arange(256)
    if dtype == "I8":
        return codes.astype(np.int8).astype(np.float32)
    if dtype == "F8_E8M0":  # powers of two
        values = np.ldexp(np.ones(256), codes - 127)
        values[255] = np.nan
        return values.astype(np.float32)
    bits = {"F8_E4M3": 3, "F8_E5M2": 2}[dtype]
    bias = (1 << (6 - bits)) - 1
    exponents, fractions = (codes & 0x7F) >> bits, codes & ((1 << bits) - 1)
    normal = exponents > 0
    values = np.ldexp((fractions + (normal << bits)).astype(np.float64), np.maximum(exponents, 1) - bias - bits)
    if dtype == "F8_E4M3":  # the kind without infinities
        values[0x7F] = values[0xFF] = np.nan
    else:
        values[exponents == 31] = np.nan
        values[[0x7C, 0xFC]] = np.inf
    signed: NDArray[np.float64] = np.where(codes & 0x80, -values, values)
    return signed.astype(np.float32)


def item_bytes(dtype: str) -> int:
    """Return the size of one number."""
    return _ITEM_BYTES.get(dtype, 1)


def read_rows(
    checkpoint: Checkpoint, tensor: StoredTensor, first: int, count: int, width: int | None = None
) -> NDArray[np.uint8]:
    """Return the bytes of some rows of a stored tensor, u8 (count, bytes of a row).

    A row has `width` numbers, by default as many as the last axis.
    """
    if width is None:
        width = tensor.shape[-1]
    raw = np.empty((count, width * item_bytes(tensor.dtype)), dtype=np.uint8)
    checkpoint.read_into(tensor, first * raw.shape[1], raw.reshape(-1).data)
    return raw


def to_f32(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Widen rows of bytes (rows, bytes of a row) to f32 (rows, numbers of a row)."""
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return table_of(dtype)[raw]


def read_scales(
    checkpoint: Checkpoint, tensor: StoredTensor, first: int, count: int, width: int | None = None
) -> NDArray[np.float32]:
    """Return some rows of scales in f32. Raises `CheckpointError` that names the tensor if one is not finite."""
    raw = read_rows(checkpoint, tensor, first, count, width)
    scales = to_f32(raw, "F8_E8M0" if tensor.dtype == "U8" else tensor.dtype)
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{tensor.shard}: the tensor {tensor.name!r} holds NaN or infinite scales")
    return scales


def unpack(raw: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return the levels in rows of packed words, u8 (rows, levels of a row).

    `raw` are rows of bytes, whole little-endian words of 32 bits unless `bits` divides 8. The lowest bits come first;
    what is left of a word at its top stands for nothing.
    """
    mask = (1 << bits) - 1
    if 8 % bits:
        words = raw.view(np.uint32)
        levels = np.empty((*words.shape, 32 // bits), dtype=np.uint8)
        for place in range(32 // bits):
            levels[..., place] = (words >> (bits * place)) & mask
    elif bits == 8:
        return raw
    else:
        levels = np.empty((*raw.shape, 8 // bits), dtype=np.uint8)
        for place in range(8 // bits):
            np.right_shift(raw, bits * place, out=levels[..., place])
        levels &= mask
    return levels.reshape(len(raw), -1)


def blockwise(
    out: NDArray[np.float32], values: NDArray[np.float32], block: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a view of rows of weights, and `values` in a shape that goes with it, one for every `block` weights.

    `values` has a row for each row of weights, or one for all. The last block of a row may have fewer weights.
    """
    rows, columns = out.shape
    if columns % block == 0:
        return out.reshape(rows, columns // block, block), values[:, :, None]
    return out, np.repeat(values, block, axis=1)[:, :columns]
