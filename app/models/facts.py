"""What a GGUF's header says about the model, in words that people know. Light to import, bounded."""

from __future__ import annotations

import collections
import math
from pathlib import Path

import msgspec

from app.models.gguf import Header, SkippedArray, read_header

_LONGEST_ARRAY = 64  # of longer ones, only the length is of interest


class TypeShare(msgspec.Struct, frozen=True):
    """How much of a file is of one tensor type."""

    tensors: int
    weights: int
    bytes: int


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """A file at a glance; sizes in bytes, `context` in tokens. What the header does not say is None."""

    path: str
    architecture: str | None
    name: str | None
    bytes: int
    weights: int
    bits_per_weight: float
    types: dict[str, TypeShare]
    context: int | None
    tokenizer: str | None
    pre_tokenizer: str | None
    tokens: int
    chat_template: bool


def open_header(path: Path) -> Header:
    """Read a header without its long arrays. Raises `ModelFileError` or `StorageError`."""
    return read_header(path, largest_array=_LONGEST_ARRAY)


def facts_of(header: Header) -> Facts:
    """Return what a header says."""
    tensors, weights, sizes = (collections.Counter[str]() for _ in range(3))
    for tensor in header.tensors:
        tensors[tensor.type_name] += 1
        weights[tensor.type_name] += math.prod(tensor.dims)
        sizes[tensor.type_name] += tensor.nbytes
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    total = weights.total()
    return Facts(
        path=str(header.path),
        architecture=header.architecture,
        name=header.name,
        bytes=header.file_size,
        weights=total,
        bits_per_weight=8 * header.file_size / total if total else 0.0,
        types={name: TypeShare(tensors[name], weights[name], size) for name, size in sizes.most_common()},
        context=header.context_length,
        tokenizer=header.text("tokenizer.ggml.model"),
        pre_tokenizer=header.text("tokenizer.ggml.pre"),
        tokens=tokens.length if isinstance(tokens, SkippedArray) else len(tokens or ()),
        chat_template=header.chat_template is not None,
    )
