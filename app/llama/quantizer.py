"""llama.cpp's quantizer: ggml's encoders on rows of weights, and the choice of every tensor's type.

The encoders are called through ctypes, which lets go of the GIL: threads run them side by side. The types are never
ported: `llama_model_quantize` itself says them in a dry run, and the same function serves as the oracle of the tests.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ModelFileError
from app.llama.library import ggml_base, load, log_tail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_OVERRIDDEN = re.compile(r": (\S+) +- applying manual override: ")
_Q8_0_FILE, _F32 = 7, 0  # a file type, and a tensor type that it never chooses by itself
_KEY_INTEGER, _KEY_STRING = 0, 3  # LLAMA_KV_OVERRIDE_TYPE_INT, _STR
_DECISION = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +(\w+), size = [^\n]*? MiB(?: \((\w+)\))?\n")


class _TypeTraits(ctypes.Structure):
    """ggml's `ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


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


@functools.cache
def chunk_encoder() -> int:
    """Return the address of ggml's encoder of rows, for native code that leaves some of them to it."""
    return ctypes.cast(_base().ggml_quantize_chunk, ctypes.c_void_p).value or 0


def decode_rows(tensor_type: int, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Widen whole blocks to f32, as llama.cpp itself does before it quantizes again; both arrays are contiguous.

    Raises `ModelFileError` for a type that ggml cannot widen.
    """
    to_float = _to_float(tensor_type)
    if not to_float:
        raise ModelFileError(f"ggml has no numbers for the tensor type {tensor_type}: it cannot be quantized")
    to_float(data.ctypes.data, out.ctypes.data, out.size)


@functools.cache
def _to_float(tensor_type: int) -> Any:
    base = _base()
    base.ggml_get_type_traits.argtypes = [ctypes.c_int]
    base.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    traits = base.ggml_get_type_traits(tensor_type).contents
    return traits.to_float if traits.is_quantized else None


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


@dataclasses.dataclass(frozen=True, slots=True)
class Choices:
    """What the caller decides about tensor types, in ggml's numbers; the rest is llama.cpp's choice.

    `overrides` are pairs of a regular expression (ECMAScript, searched in the tensor's name; the first that is found
    counts) and a type. `output` is the type of output.weight, `embedding` that of the token embeddings.
    """

    overrides: tuple[tuple[str, int], ...] = ()
    output: int | None = None
    embedding: int | None = None


NO_CHOICES = Choices()


def select_types(
    model: Path, file_type: int, choices: Choices = NO_CHOICES, *, with_importance: bool = False
) -> dict[str, str]:
    """Ask llama.cpp which type it would give to each tensor of a GGUF; of the weights, nothing is read.

    `file_type` is llama.cpp's number of the recipe (15: Q4_K_M). `with_importance` tells that an importance matrix will
    be used, which changes some choices. Returns tensor name → type name, such as `q6_K`.
    Raises `ModelFileError` if llama.cpp refuses the model's hyper-parameters or a regular expression.
    """
    with log_tail.captured() as pieces:
        importance = {"": memoryview(bytes(4))} if with_importance else {}  # only that there is one matters here
        _quantize(model, Path(os.devnull), file_type, choices, importance, {}, threads=1, dry_run=True)
    return {name: new or old for name, old, new in _DECISION.findall("".join(pieces))}


def find_tensors(model: Path, pattern: str) -> list[str]:
    """Return the names of a GGUF's tensors that an override with this pattern would reach.

    Raises `ModelFileError` if the pattern is no regular expression.
    """
    with log_tail.captured() as pieces:
        choices = Choices(overrides=((pattern, _F32),))
        _quantize(model, Path(os.devnull), _Q8_0_FILE, choices, {}, {}, threads=1, dry_run=True)
    return _OVERRIDDEN.findall("".join(pieces))


def quantize_file(
    source: Path,
    target: Path,
    file_type: int,
    choices: Choices = NO_CHOICES,
    *,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    keys: Mapping[str, int | bytes] | None = None,
    threads: int = 0,
    allow_requantize: bool = False,
) -> None:
    """Run llama.cpp's own quantizer on a whole GGUF. Raises `ModelFileError` with its last words if it fails.

    `importance` holds for tensor names what their columns weigh (experts × columns); `keys` are set at the end.
    `allow_requantize` takes sources that are quantized already.
    """
    data = {name: memoryview(values.tobytes()) for name, values in (importance or {}).items()}
    _quantize(
        source,
        target,
        file_type,
        choices,
        data,
        keys or {},
        threads=threads,
        dry_run=False,
        requantize=allow_requantize,
    )


def _quantize(
    source: Path,
    target: Path,
    file_type: int,
    choices: Choices,
    importance: Mapping[str, memoryview],
    keys: Mapping[str, int | bytes],
    *,
    threads: int,
    dry_run: bool,
    requantize: bool = False,
) -> None:
    llama_cpp = load()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = file_type
    params.dry_run = dry_run
    params.allow_requantize = requantize
    if choices.output is not None:
        params.output_tensor_type = choices.output
    if choices.embedding is not None:
        params.token_embedding_type = choices.embedding
    if choices.overrides:
        rows = [(pattern.encode(), number) for pattern, number in choices.overrides]
        params.tt_overrides = _array(llama_cpp.llama_model_tensor_override, [*rows, (None, 0)])
    buffers = [ctypes.create_string_buffer(bytes(data), len(data)) for data in importance.values()]
    if importance:
        floats = ctypes.POINTER(ctypes.c_float)
        entries = [
            (name.encode(), ctypes.cast(buffer, floats), len(buffer) // 4)
            for name, buffer in zip(importance, buffers, strict=True)
        ]
        params.imatrix = _array(llama_cpp.llama_model_imatrix_data, [*entries, (None, None, 0)])
    if keys:
        overrides = [_key_override(llama_cpp, key, value) for key, value in keys.items()]
        params.kv_overrides = _array(llama_cpp.llama_model_kv_override, [*overrides, ()])
    log_tail.clear()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        said = "; ".join(log_tail.lines(minimum_level=4)[-3:]) or "without saying why"
        raise ModelFileError(f"llama.cpp cannot quantize this model: {said}")


def _array(kind: Any, rows: list[Any]) -> Any:
    return (kind * len(rows))(*rows)


def _key_override(llama_cpp: Any, key: str, value: int | bytes) -> tuple[int, bytes, Any]:
    union = llama_cpp.llama_model_kv_override_value()
    if isinstance(value, int):
        union.val_i64 = value
        return _KEY_INTEGER, key.encode(), union
    union.val_str = value
    return _KEY_STRING, key.encode(), union
