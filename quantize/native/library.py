"""The shared library of the kernels, if there is one for this machine."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.llama import quantizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PATH = Path(__file__).with_name("kernels.so")
LEVELS = ("sse2", "avx2")  # by the number that the library gives to an instruction set


@dataclasses.dataclass(frozen=True)
class Library:
    """An open library and the instruction set that its kernels are to use."""

    path: Path
    level: int
    functions: Any = dataclasses.field(repr=False)

    def encode_rows(
        self,
        tensor_type: int,
        rows: NDArray[np.float32],
        out: NDArray[np.uint8],
        importance: NDArray[np.float32] | None = None,
    ) -> int:
        """Quantize `rows` (row count × weights a row: whole blocks, contiguous) into `out`, which has their bytes.

        `importance` has one number a column. Returns how many weights were left to ggml, as their numbers are such
        that vectors would round them otherwise. Raises `ValueError` for a type that there is no kernel for.
        """
        count, weights = rows.shape
        if out.nbytes != count * quantizer.row_bytes(tensor_type, weights):
            raise AssertionError(f"{out.nbytes} bytes do not hold {count} rows of {weights} weights in {tensor_type}")
        asked = self.functions.pestle_encode(
            self.level,
            tensor_type,
            rows.ctypes.data,
            out.ctypes.data,
            count,
            weights,
            None if importance is None else importance.ctypes.data,
            quantizer.chunk_encoder(),
        )
        if asked < 0:
            raise ValueError(f"there is no kernel for the tensor type {tensor_type}")
        return int(asked)


@functools.cache
def open_library(path: Path = PATH, level: int | None = None) -> Library | None:
    """Open the library; `level` is an index of `LEVELS`, the best of the machine if not given.

    Returns None if there is no library, or none that this machine can run.
    """
    try:
        functions = ctypes.CDLL(str(path))
        best = int(functions.pestle_best_level())
    except (OSError, AttributeError):
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    functions.pestle_encode.argtypes = [ctypes.c_int, ctypes.c_int, pointer, pointer, count, count, pointer, pointer]
    functions.pestle_encode.restype = count
    return Library(path, best if level is None else min(level, best), functions)
