"""Writes importance matrices in the GGUF format of llama-imatrix, which llama-quantize and it read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.errors import ModelFileError, VerificationError
from app.models.gguf_types import ValueType
from quantize.activation_sums import ColumnSums
from quantize.header import KeyTable, TensorEntry, aligned, encode_header
from quantize.importance import CHUNK_COUNT, CHUNK_SIZE, COUNTS, DATASETS, SUMS, ImportanceMatrix
from quantize.writer import AtomicFile


def write_importance(
    out: Path, tensors: Mapping[str, ColumnSums], *, dataset: str, chunks: int, chunk_tokens: int
) -> int:
    """Write the sums and return the file's size; `dataset` names the text. The file is whole or not there.

    Raises `StorageError`.
    """
    keys = KeyTable()
    keys.text("general.type", "imatrix")
    keys.array(DATASETS, ValueType.STRING, [dataset])
    keys.u32(CHUNK_COUNT, chunks)
    keys.u32(CHUNK_SIZE, chunk_tokens)
    arrays = _arrays(tensors)
    entries, offset = [], 0
    for name, array in arrays.items():
        entries.append(TensorEntry(name, array.shape, "f32", offset))
        offset += aligned(array.nbytes)
    header = encode_header(keys, entries)
    with AtomicFile(out.absolute(), len(header) + offset) as file:
        file.write_at(0, memoryview(header))
        for entry, array in zip(entries, arrays.values(), strict=True):
            padding = bytes(aligned(array.nbytes) - array.nbytes)
            file.write_at(len(header) + entry.offset, memoryview(array.tobytes() + padding))
        file.check(_verify)
        file.publish()
    return len(header) + offset


def _verify(part: Path) -> None:
    try:
        ImportanceMatrix.open(part)
    except ModelFileError as error:
        raise VerificationError(f"the written file is damaged: {error.message}") from error


def _arrays(tensors: Mapping[str, ColumnSums]) -> dict[str, NDArray[np.float32]]:
    """Return what the file holds, in its order. Outer dimensions of 1 are left out, as ggml does."""
    arrays = {}
    for name, entry in sorted(tensors.items()):
        matrices = entry.counts.size
        sums = entry.sums.astype(np.float32).reshape(matrices, -1)
        counts = entry.counts.astype(np.float32).reshape(matrices, 1)
        arrays[f"{name}{SUMS}"] = sums if matrices > 1 else sums[0]
        arrays[f"{name}{COUNTS}"] = counts if matrices > 1 else counts[0]
    return arrays
