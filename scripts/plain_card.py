"""Writes the card that ties a GGUF to its digests, and says nothing else of it: what `pestle verify` compares with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from app.models.card import Card, QuantizedFile, Recipe, Source, Tensor
from app.models.gguf import read_header
from quantize.card import write_card


def write_plain_card(path: Path, type_name: str, recipe: Recipe | None = None) -> Path:
    """Write the card of a whole file, hashed in one piece at a time; returns the card's path."""
    header, content = read_header(path), path.read_bytes()
    ends = [header.data_offset + tensor.offset + tensor.nbytes for tensor in header.tensors]
    tensors = [
        Tensor(
            name=tensor.name, type=tensor.type_name, shape=tensor.shape, bytes=tensor.nbytes,
            sha256_through=_digest(content[:end]),
        )
        for tensor, end in zip(header.tensors, ends, strict=True)
    ]  # fmt: skip
    card = Card(
        file=QuantizedFile(
            name=path.name, bytes=len(content), sha256=_digest(content), header_bytes=header.data_offset,
            header_sha256=_digest(content[: header.data_offset]),
        ),
        type=type_name, recipe=recipe or Recipe(), source=Source(kind="folder", name="Model", revision=None, files=[]),
        library="", pestle="", made="", weights=0, bits_per_weight=0, tensors=tensors,
    )  # fmt: skip
    return write_card(card, path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
