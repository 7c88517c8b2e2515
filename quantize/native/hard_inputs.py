"""Weights that are hard to quantize exactly, and ordinary ones: what the kernels are compared with ggml on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]
Generator = Callable[[np.random.Generator, int], NDArray[np.floating]]
"""Makes so many weights, a multiple of 256."""

SUPERBLOCK = 256


def _gaussian(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return random.standard_normal(count, np.float32) * np.float32(0.02)


def bf16(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    """Make ordinary weights, as a checkpoint holds them."""
    bits = _gaussian(random, count).astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def _blockwise(values: NDArray[Any], block: int, count: int) -> NDArray[np.float64]:
    """Give each value to so many weights."""
    return np.repeat(values.astype(np.float64), block)[:count]


def _powers(random: np.random.Generator, least: int, most: int, block: int, count: int) -> NDArray[np.float64]:
    """Give each block a power of two, with exponents from `least` to below `most`."""
    return np.asarray(np.exp2(_blockwise(random.integers(least, most, -(-count // block)), block, count)))


def _per_block(random: np.random.Generator, count: int, block: int = 16) -> NDArray[np.floating]:
    """Give a number a block, each again for all weights of its block."""
    return _blockwise(random.standard_normal(-(-count // block)), block, count)


def _magnitudes(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return _gaussian(random, count) * _powers(random, -40, 30, 32, count)


def _heavy_tails(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return random.standard_t(2, count) * 0.01


def _outliers(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return np.asarray(np.where(random.random(count) < 0.01, 1e4, 1.0) * _gaussian(random, count))


def _constants(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return _per_block(random, count, 8 << int(random.integers(0, 6)))


def zeros(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    """Make blocks of zeros of either sign, and some sparse ones."""
    zero = np.where(random.random(count) < 0.5, 0.0, -0.0)
    dense = _blockwise(random.random(-(-count // 32)) < 0.3, 32, count) > 0
    return np.where(dense, np.where(random.random(count) < 0.2, _gaussian(random, count), zero), zero)


def _denormals(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    small = random.integers(0, 1 << 24, count).astype(np.uint32).view(np.float32)
    return np.where(random.random(count) < 0.5, small, -small) * np.float32(1 + int(random.integers(0, 3)) * 1e20)


def _one_sided(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    signs = random.choice(np.array([-1.0, 1.0]), -(-count // 32))
    return np.asarray(np.abs(_gaussian(random, count)) * _blockwise(signs, 32, count))


def _near_constant(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    """Give blocks with a spread of a few last places, where the search's rounding wraps around."""
    spread = _powers(random, -24, -4, 32, count)
    return np.asarray(-np.abs(_per_block(random, count, 32)) * (1 + random.standard_normal(count) * spread))


def _flat_superblocks(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    """Give blocks that all are nearly constant, at very different values: their scales say nothing of their size."""
    spread = _powers(random, -24, 2, SUPERBLOCK, count)
    values = -np.abs(_per_block(random, count, 32)) * _powers(random, -4, 16, 32, count)
    return np.asarray(values + random.integers(-3, 4, count) * spread)


def _tiny(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    """Give blocks around 1e-15, below which llama.cpp takes a block for zero."""
    return _gaussian(random, count) * _powers(random, -47, -34, 16, count)


def _large(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    """Give blocks whose scales are at the end of what a half can hold, beside small ones."""
    return _gaussian(random, count) * _powers(random, 24, 36, SUPERBLOCK, count) * _powers(random, -12, 1, 32, count)


def _half_ties(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    """Give superblocks whose scales lie just between two halves: their largest block says scale and minimum."""
    between = (random.integers(1024, 2048, -(-count // SUPERBLOCK)) + 0.5) / 2048
    steps = random.integers(-32, 32, count)
    steps[::32], steps[16::32] = -32, 31
    return steps * _blockwise(between, SUPERBLOCK, count)


def _ties(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return random.integers(-64, 65, count) * 0.5 * 2.0 ** int(random.integers(-12, 4))


def _levels(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return random.integers(0, 16, count) * 0.25 - _blockwise(random.integers(0, 8, -(-count // 32)), 32, count)


def _ramps(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return (np.arange(count) % int(random.integers(5, 300)) - float(random.integers(0, 100))) * 1e-3


def _sparse(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return np.where(random.random(count) < 0.03, random.standard_normal(count), 0.0)


def _two_values(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return np.where(random.random(count) < 0.5, -1.0, float(random.standard_normal())) * 0.1


def _uneven_blocks(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    """Give superblocks where one block's scale makes those of the others round to 0."""
    return _gaussian(random, count) * _powers(random, -14, 6, 16, count)


def _odd_minima(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    """Give blocks where the fit prefers a negative scale: almost all weights at the top, a few far below."""
    low = np.where(random.random(count) < 0.06, -1.0, 0.0) + random.standard_normal(count) * 1e-3
    return low + _blockwise(random.integers(-2, 1, -(-count // 32)), 32, count)


def _huge(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return np.clip(_gaussian(random, count) * _powers(random, 20, 128, 1, count), -3e38, 3e38)


def _not_numbers(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    wrong = random.choice(np.array([np.nan, np.inf, -np.inf], np.float32), count)
    return np.where(random.random(count) < 0.002, wrong, _gaussian(random, count))


def _any_bits(random: np.random.Generator, count: int) -> NDArray[np.floating]:
    return random.integers(0, 1 << 32, count, np.uint32).view(np.float32)


FINITE: tuple[Generator, ...] = (
    _gaussian, bf16, _magnitudes, _heavy_tails, _outliers, _constants, zeros, _denormals, _one_sided, _near_constant,
    _ties, _levels, _ramps, _sparse, _two_values, _tiny, _large, _half_ties, _flat_superblocks, _uneven_blocks,
    _odd_minima, _huge,
)  # fmt: skip
ALL: tuple[Generator, ...] = (*FINITE, _not_numbers, _any_bits)


def pieces(seed: int, count: int, generators: tuple[Generator, ...] = ALL) -> Iterator[tuple[str, Weights]]:
    """Yield for each generator its name and `count` weights of it, a multiple of 256."""
    random = np.random.default_rng(seed)
    for generator in generators:
        with np.errstate(all="ignore"):
            weights = np.ascontiguousarray(generator(random, count), dtype=np.float32)
        yield generator.__name__.strip("_"), weights


def as_stored(weights: Weights, source: str) -> NDArray[Any]:
    """Return the bits that a checkpoint of type f32, bf16 or f16 has for weights: bf16 is cut, f16 rounded."""
    if source == "bf16":
        return (weights.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(all="ignore"):
        return weights.astype(np.float16).view(np.uint16) if source == "f16" else weights


def importance(seed: int, columns: int) -> Weights:
    """Make how much columns matter: mean squares, some far above the others; in every second block, most of them 0."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(columns, np.float32) ** 2
    share = np.tile(np.repeat(np.array([0.0, 0.95, 0.02, 0.8]), 32), -(-columns // 128))[:columns]
    values[random.random(columns) < share] = 0
    values[random.random(columns) < 0.02] *= 1e4
    return values
