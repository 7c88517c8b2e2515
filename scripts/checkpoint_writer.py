"""Write Hugging Face checkpoint folders with numpy alone: safetensors files, their index, and the folder as a whole.

Tensors are produced one at a time while the file is being written, so that memory is bounded by the largest tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: `values()` returns it as float32 of `shape`, when its turn comes.

    One with a `dtype` has it whatever the others have; U8 is written as it is.
    """

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray[Any, Any]]
    dtype: str | None = None

    def nbytes(self, dtype: str) -> int:
        """Return its size in the file."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype or dtype]


def encode(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Round float32 values to the nearest (ties to even) of BF16, F16 or F32; finite values only. U8 is U8."""
    if dtype == "U8":
        return np.ascontiguousarray(values, dtype=np.uint8)
    if dtype == "F32":
        return np.ascontiguousarray(values, dtype="<f4")
    if dtype == "F16":
        return np.ascontiguousarray(values, dtype="<f2")
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded: np.ndarray[Any, Any] = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return rounded.astype("<u2")


def write_safetensors(
    path: Path, tensors: Sequence[Tensor], dtype: str, *, metadata: dict[str, str] | None = None
) -> Iterator[Tensor]:
    """Write one safetensors file; yields each tensor after it is written, so that the caller can show progress."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in tensors:
        size = tensor.nbytes(dtype)
        entry = {"dtype": tensor.dtype or dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        header[tensor.name] = entry
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            values = tensor.values()
            if values.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: {values.shape} produced, {tensor.shape} announced")
            file.write(encode(values, tensor.dtype or dtype).data)
            yield tensor
        file.flush()
        os.fsync(file.fileno())


def write_shards(folder: Path, tensors: Sequence[Tensor], dtype: str, count: int) -> Iterator[Tensor]:
    """Write `model.safetensors`, or `count` shards of about equal size with their index; yields as it goes."""
    if count == 1:
        yield from write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    total = sum(tensor.nbytes(dtype) for tensor in tensors)
    shards: list[list[Tensor]] = [[] for _ in range(count)]
    before = 0
    for tensor in tensors:
        shards[min(before * count // total, count - 1)].append(tensor)
        before += tensor.nbytes(dtype)
    shards = [shard for shard in shards if shard]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        yield from write_safetensors(folder / name, shard, dtype)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    """Write JSON the way that Hugging Face's libraries do: indented, and not escaped."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside `out` that takes its place when the block ends well, and vanishes otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = type(out)(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if out.exists():
            replaced = type(out)(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            out.rename(replaced / out.name)
            temporary.rename(out)
            shutil.rmtree(replaced)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
