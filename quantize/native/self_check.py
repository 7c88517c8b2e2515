"""Compares a kernel with the installed ggml before it is used, and remembers what came of it.

ggml's bytes depend on how it was compiled (fused multiply-adds differ), so that they are the judge on every machine. A
verdict is kept in the cache folder under the digest of all that it depends on: both libraries, the processor, the
kernel and the weights of the comparison. What cannot be kept or read is compared again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import secrets
from pathlib import Path

import numpy as np

from app.config import ServeSettings, cache_folder
from app.llama import quantizer
from app.llama.library import ggml_base_path
from quantize.native import hard_inputs
from quantize.native.library import Library

_CHECKED_WEIGHTS = 1 << 19  # 2 MB
_ROW = 3 * hard_inputs.SUPERBLOCK
_SEED = 8


def is_exact(library: Library, tensor_type: int, *, weighted: bool) -> bool:
    """Tell whether a kernel gives ggml's bytes; `weighted`: with an importance matrix. About 0.1 s the first time."""
    kept = _folder() / _digest(library, tensor_type, weighted=weighted)
    with contextlib.suppress(OSError):
        if (verdict := kept.read_bytes()) in {b"same", b"different"}:
            return verdict == b"same"
    same = compare(library, tensor_type, weighted=weighted) == 0
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f".{secrets.token_hex(8)}")
        part.write_bytes(b"same" if same else b"different")
        part.replace(kept)
    return same


def compare(
    library: Library,
    tensor_type: int,
    *,
    weighted: bool,
    seed: int = _SEED,
    weights: int = _CHECKED_WEIGHTS,
    generators: tuple[hard_inputs.Generator, ...] = hard_inputs.FINITE,
) -> int:
    """Quantize so many weights with the kernel and with ggml; returns how many bytes differ."""
    rows = max(1, weights // len(generators) // _ROW)
    columns = hard_inputs.importance(seed, _ROW) if weighted else None
    row_bytes = quantizer.row_bytes(tensor_type, _ROW)
    ours, theirs = np.zeros(rows * row_bytes, np.uint8), np.zeros(rows * row_bytes, np.uint8)
    unaligned = np.empty(rows * _ROW + 1, np.float32)[1:].reshape(rows, _ROW)
    differing = 0
    for _, piece in hard_inputs.pieces(seed, rows * _ROW, generators):
        unaligned[:] = piece.reshape(rows, _ROW)
        quantizer.encode_rows(tensor_type, unaligned, theirs, columns)
        ours[:] = ~theirs  # a kernel that writes nothing must not pass
        library.encode_rows(tensor_type, unaligned, ours, columns)
        differing += int(np.count_nonzero(ours != theirs))
    return differing


def _digest(library: Library, tensor_type: int, *, weighted: bool) -> str:
    kernel = f"{library.name} {tensor_type} {weighted} {_CHECKED_WEIGHTS} {_SEED} {np.__version__}\n"
    digest = hashlib.sha256(kernel.encode() + _processor())
    for path in (library.path, ggml_base_path(), Path(hard_inputs.__file__)):
        digest.update(_file_digest(path))
    return digest.hexdigest()


@functools.cache
def _file_digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


@functools.cache
def _processor() -> bytes:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
        return b"\n".join(line for line in lines if line.startswith((b"model name", b"flags", b"Features")))
    return f"{platform.machine()} {platform.processor()}".encode()


def _folder() -> Path:
    return cache_folder(ServeSettings(cache_dir=os.environ.get("LLM_CACHE_DIR", ""))) / "kernels"
