"""llama.cpp's quantizer: ggml's encoders on rows of weights, and the choice of every tensor's type.

The encoders are called through ctypes, which lets go of the GIL: threads run them side by side. The types are never
ported: `llama_model_quantize` itself says them in a dry run, and the same function serves as the oracle of the tests.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ModelFileError
from app.llama.library import ggml_base, load, log_tail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DECISION = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +(\w+), size = [^\n]*? MiB(?: \((\w+)\))?\n")


@functools.cache
def _base() -> Any:
    base = ggml_base()
    pointer, size, count = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    base.ggml_quantize_chunk.restype = size
    base.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, size]
    base.ggml_validate_row_data.restype = ctypes.c_bool
    base.ggml_row_size.argtypes = [ctypes.c_int, count]
    base.ggml_row_size.restype = size
    base.ggml_blck_size.argtypes = [ctypes.c_int]
    base.ggml_blck_size.restype = count
    for name in ("ggml_bf16_to_fp32_row", "ggml_fp16_to_fp32_row", "ggml_fp32_to_bf16_row", "ggml_fp32_to_fp16_row"):
        getattr(base, name).argtypes = [pointer, pointer, count]
        getattr(base, name).restype = None
    return base


def row_bytes(tensor_type: int, weights: int) -> int:
    """Return the bytes of one row of `weights` weights, a multiple of the type's block."""
    return int(_base().ggml_row_size(tensor_type, weights))


def block_weights(tensor_type: int) -> int:
    """Return how many weights share one block of the type."""
    return int(_base().ggml_blck_size(tensor_type))


def encode_rows(
    tensor_type: int,
    rows: NDArray[np.float32],
    out: NDArray[np.uint8],
    importance: NDArray[np.float32] | None = None,
) -> None:
    """Quantize `rows` (row count × weights a row, contiguous) into `out`, which has exactly the bytes they take."""
    count, weights = rows.shape
    written = _base().ggml_quantize_chunk(
        tensor_type,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        count,
        weights,
        None if importance is None else importance.ctypes.data,
    )
    if written != out.nbytes:
        raise AssertionError(f"ggml wrote {written} bytes for type {tensor_type}, {out.nbytes} were planned")


def is_valid(tensor_type: int, data: NDArray[Any]) -> bool:
    """Tell whether every scale (or, unquantized, every weight) in `data` is a finite number."""
    return bool(_base().ggml_validate_row_data(tensor_type, data.ctypes.data, data.nbytes))


def bf16_to_f32(source: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """Widen; both arrays are contiguous and have the same number of items."""
    _base().ggml_bf16_to_fp32_row(source.ctypes.data, out.ctypes.data, source.size)


def f16_to_f32(source: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """Widen; both arrays are contiguous and have the same number of items."""
    _base().ggml_fp16_to_fp32_row(source.ctypes.data, out.ctypes.data, source.size)


def f32_to_bf16(source: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Round to nearest even; both arrays are contiguous and have the same number of items."""
    _base().ggml_fp32_to_bf16_row(source.ctypes.data, out.ctypes.data, source.size)


def f32_to_f16(source: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Round to nearest even; both arrays are contiguous and have the same number of items."""
    _base().ggml_fp32_to_fp16_row(source.ctypes.data, out.ctypes.data, source.size)


def select_types(model: Path, file_type: int) -> dict[str, str]:
    """Ask llama.cpp which type it would give to each tensor of a GGUF; of the weights, nothing is read.

    `file_type` is llama.cpp's number of the recipe (15: Q4_K_M). Returns tensor name → type name, such as `q6_K`.
    Raises `ModelFileError` if llama.cpp refuses the model's hyper-parameters.
    """
    with log_tail.captured() as pieces:
        _quantize(model, Path(os.devnull), file_type, threads=1, dry_run=True)
    return {name: new or old for name, old, new in _DECISION.findall("".join(pieces))}


def quantize_file(source: Path, target: Path, file_type: int, *, threads: int = 0) -> None:
    """Run llama.cpp's own quantizer on a whole GGUF. Raises `ModelFileError` with its last words if it fails."""
    _quantize(source, target, file_type, threads=threads, dry_run=False)


def _quantize(source: Path, target: Path, file_type: int, *, threads: int, dry_run: bool) -> None:
    llama_cpp = load()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = file_type
    params.dry_run = dry_run
    log_tail.clear()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        said = "; ".join(log_tail.lines(minimum_level=4)[-3:]) or "without saying why"
        raise ModelFileError(f"llama.cpp cannot quantize this model: {said}")
