"""MXFP4: 32 weights of 4 bits with one exponent, moved from a checkpoint's order into ggml's blocks. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_WEIGHTS = 32
BLOCK_BYTES = 17

_LOW, _HIGH, _FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(4)


def fill_blocks(out: NDArray[np.uint8], codes: NDArray[np.uint64], exponents: NDArray[np.uint8]) -> None:
    """Fill ggml's blocks, u8 (blocks, 17), from 16 bytes of codes for each, (blocks, 2), and its exponent, (blocks,).

    A byte of a checkpoint holds two neighbours, the first in its low half. A byte of ggml holds two weights that are 16
    apart.
    """
    first, second = codes[:, 0], codes[:, 1]  # weights 0 to 15, and 16 to 31
    even = (first & _LOW) | ((second & _LOW) << _FOUR)
    odd = ((first >> _FOUR) & _LOW) | (second & _HIGH)
    out[:, 0] = exponents
    out[:, 1::2] = even.view(np.uint8).reshape(-1, 8)
    out[:, 2::2] = odd.view(np.uint8).reshape(-1, 8)
