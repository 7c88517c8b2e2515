"""The shared library of the kernels, if there is one for this machine."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PATH = Path(__file__).with_name("kernels.so")
_WIDTHS = {"f32": 4, "f16": 2, "bf16": 2}  # bytes of a weight, by the types that kernels read
SOURCES = {TENSOR_TYPE_NUMBERS[name]: width for name, width in _WIDTHS.items()}
F32 = TENSOR_TYPE_NUMBERS["f32"]


@dataclasses.dataclass(frozen=True)
class Library:
    """An open library and the instruction set that its kernels are to use, by number and by name."""

    path: Path
    level: int
    name: str
    functions: Any = dataclasses.field(repr=False)

    def encode_rows(
        self,
        tensor_type: int,
        rows: NDArray[Any],
        out: NDArray[np.uint8],
        importance: NDArray[np.float32] | None = None,
        source: int = F32,
    ) -> int:
        """Quantize `rows` (row count × weights a row: whole blocks, contiguous) into `out`, which has their bytes.

        `source` is the type of the rows, one of `SOURCES`, whose bits they hold. `importance` has one number a column.
        Returns how many weights were left to ggml, as their numbers are such that vectors would round them otherwise.
        Raises `ValueError` for a type that there is no kernel for.
        """
        count, weights = rows.shape
        row_bytes = quantizer.row_bytes(tensor_type, weights)
        if out.nbytes != count * row_bytes or rows.itemsize != SOURCES[source]:
            raise AssertionError(f"{out.nbytes} bytes do not hold {count} rows of {weights} weights in {tensor_type}")
        asked = self.functions.pestle_encode(
            self.level,
            tensor_type,
            source,
            rows.ctypes.data,
            out.ctypes.data,
            count,
            weights,
            row_bytes,
            None if importance is None else importance.ctypes.data,
            quantizer.chunk_encoder(),
        )
        if asked < 0:
            raise ValueError(f"there is no kernel for the tensor type {tensor_type}")
        return int(asked)


@functools.cache
def open_libraries(path: Path = PATH) -> tuple[Library, ...]:
    """Open the library, once for each instruction set that this machine has; the last one is to be preferred.

    On x86-64 the instruction sets give the same bytes; on arm64 they are for ggmls that were compiled differently.
    Returns nothing if there is no library, or none that this machine can run.
    """
    try:
        functions = ctypes.CDLL(str(path))
        functions.pestle_level.restype = ctypes.c_char_p
        number, pointer, count = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        functions.pestle_encode.argtypes = [*[number] * 3, *[pointer] * 2, *[count] * 3, *[pointer] * 2]
        functions.pestle_encode.restype = count
    except (OSError, AttributeError):
        return ()
    names = itertools.takewhile(lambda name: name is not None, map(functions.pestle_level, itertools.count()))
    return tuple(Library(path, level, name.decode(), functions) for level, name in enumerate(names))
