"""The encoder of the pipeline: a kernel where one is proven, ggml everywhere else; the same bytes in every case."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.native import self_check
from quantize.native.library import F32, SOURCES, Library, open_libraries

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

KERNELS = ("q8_0", "q4_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_nl", "iq4_xs")
UNWEIGHTED = ("q4_0",)
"""Those that are for quantizing without an importance matrix only."""
_NUMBERS = {TENSOR_TYPE_NUMBERS[name]: name for name in KERNELS}

_log = logging.getLogger(__name__)
_verdicts: dict[tuple[int, bool], Library | None] = {}
_checking = threading.Lock()  # the first slabs of a type come on several threads at once


def encode_rows(
    tensor_type: int,
    rows: NDArray[Any],
    out: NDArray[np.uint8],
    importance: NDArray[np.float32] | None = None,
    source: int = F32,
) -> None:
    """Quantize `rows` (row count × weights a row, contiguous) into `out`, which has exactly the bytes they take.

    `source` is the type whose bits the rows hold. If it is not f32, `reads` must have said yes.
    """
    weighted = importance is not None
    kernel = _proven(tensor_type, weighted=weighted) if has_kernel(tensor_type, weighted=weighted) else None
    if kernel is not None:
        kernel.encode_rows(tensor_type, rows, out, importance, source)
    elif source == F32:
        quantizer.encode_rows(tensor_type, rows, out, importance)
    else:
        raise AssertionError(f"ggml's encoder reads f32 only, not type {source}")


def reads(source: int, tensor_type: int, *, weighted: bool) -> bool:
    """Tell whether weights of the type `source` need not be widened first; compares the kernel if need be."""
    has = source in SOURCES and has_kernel(tensor_type, weighted=weighted)
    return has and _proven(tensor_type, weighted=weighted) is not None


def chosen(tensor_type: int, *, weighted: bool) -> str | None:
    """Name the instruction set whose kernel encodes a type; None where ggml does. Compares the kernel if need be."""
    kernel = _proven(tensor_type, weighted=weighted) if has_kernel(tensor_type, weighted=weighted) else None
    return None if kernel is None else kernel.name


def has_kernel(tensor_type: int, *, weighted: bool) -> bool:
    """Tell whether there is a kernel for a type, `weighted`: with an importance matrix."""
    return tensor_type in _NUMBERS and not (weighted and _NUMBERS[tensor_type] in UNWEIGHTED)


def notes(type_names: Iterable[str], *, weighted: bool) -> list[str]:
    """Tell why types that there are kernels for would be quantized without; compares the kernels if need be."""
    names = set(type_names)
    wanted = [name for name in KERNELS if name in names and has_kernel(TENSOR_TYPE_NUMBERS[name], weighted=weighted)]
    if wanted and not open_libraries():
        return ["Pestle's own kernels are not installed: ggml quantizes instead, to the same bytes in more time"]
    off = [name for name in wanted if _proven(TENSOR_TYPE_NUMBERS[name], weighted=weighted) is None]
    if not off:
        return []
    return [f"Pestle's own kernels give other bytes than this ggml for {', '.join(off)}: ggml quantizes instead"]


def _proven(tensor_type: int, *, weighted: bool) -> Library | None:
    kernel = tensor_type, weighted
    if kernel not in _verdicts:
        with _checking:
            if kernel not in _verdicts:
                _verdicts[kernel] = _judge(tensor_type, weighted=weighted)
    return _verdicts[kernel]


def _judge(tensor_type: int, *, weighted: bool) -> Library | None:
    libraries = open_libraries()
    for library in reversed(libraries):
        if self_check.is_exact(library, tensor_type, weighted=weighted):
            return library
    if not libraries:
        return None
    _log.warning(
        "the kernel for %s%s gives other bytes than the installed ggml; ggml quantizes instead",
        _NUMBERS[tensor_type],
        " with an importance matrix" if weighted else "",
    )
    return None
