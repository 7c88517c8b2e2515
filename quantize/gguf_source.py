"""An existing GGUF as a source: its keys are carried over and its tensors quantized, as llama-quantize does it.

What is f32, f16 or bf16 loses nothing but what the new type costs. What is quantized already is widened to f32 by ggml
first, which adds one error to another: that needs the user's consent.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError, ModelFileError, UsageError
from app.llama import quantizer
from app.models.embedded_card import CARD_KEY
from app.models.gguf import DEFAULT_ALIGNMENT, Header, TensorInfo, read_header
from app.models.gguf_types import TENSOR_TYPE_NUMBERS, TENSOR_TYPES
from quantize.checkpoint import DTYPE_BYTES, Checkpoint, DecodedTensor, StoredTensor
from quantize.header import KeyTable, Value
from quantize.tensors import Part, TensorSpec

_SPLIT = ("split.no", "split.count", "split.tensors.count")
_LAST_PART = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclasses.dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF, understood: the keys to carry over, the tensors in their order, and the type of each."""

    path: Path
    keys: KeyTable
    specs: list[TensorSpec]
    types: dict[str, str]
    checkpoint: Checkpoint

    def check_originals(self, decided: Mapping[str, Mapping[str, str]]) -> None:
        """Raise `UsageError` if a tensor that is quantized already would be quantized again, to another type."""
        for recipe, types in decided.items():
            for name, wanted in types.items():
                stored = self.types[name]
                if TENSOR_TYPES[TENSOR_TYPE_NUMBERS[stored]][1] > 1 and stored != wanted:
                    raise UsageError(
                        f"{self.path}: {name} is {stored} already; to make it {wanted} for {recipe.upper()} adds one "
                        "error to another. Give the original model, or a GGUF in bf16, f16 or f32; --allow-requantize "
                        "does it nevertheless",
                        param="allow-requantize",
                    )


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """Numbers in one of ggml's types, widened by ggml."""

    stored: StoredTensor
    type_name: str

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The blocks."""
        return (self.stored,)

    def decode(self, checkpoint: Checkpoint, first: int, out: NDArray[np.float32]) -> None:
        """Fill rows, counted over all axes but the last."""
        _, block_weights, block_bytes = TENSOR_TYPES[TENSOR_TYPE_NUMBERS[self.type_name]]
        row_bytes = out.shape[1] // block_weights * block_bytes
        raw = np.empty(len(out) * row_bytes, dtype=np.uint8)
        checkpoint.read_into(self.stored, first * row_bytes, raw.data)
        number = TENSOR_TYPE_NUMBERS[self.type_name]
        if not quantizer.is_valid(number, raw):
            raise CheckpointError(
                f"{self.stored.shard}: the tensor {self.stored.name!r} holds scales that are NaN or infinite"
            )
        quantizer.decode_rows(number, raw, out)


def open_gguf(path: Path) -> GgufModel:
    """Read a GGUF's header. Raises `ModelFileError` for one that is damaged, one part of several, or oddly aligned."""
    header = read_header(path)
    parts = header.integer("split.count")
    if parts is not None and parts > 1:
        raise ModelFileError(
            f"{path}: part {(header.integer('split.no') or 0) + 1} of {parts} of a GGUF in parts; make it one file "
            f"first: llama-gguf-split --merge {_first_part(path)} OUT.gguf"
        )
    if header.alignment != DEFAULT_ALIGNMENT:
        raise ModelFileError(f"{path}: general.alignment is {header.alignment}; {DEFAULT_ALIGNMENT} is read")
    if not header.tensors:
        raise ModelFileError(f"{path}: holds no tensors, only a header")
    specs = [
        TensorSpec(tensor.name, tensor.shape, (Part(tensor.name, _rows(tensor), tensor.shape[-1]),))
        for tensor in header.tensors
    ]
    tensors = {tensor.name: _stored(header, tensor) for tensor in header.tensors}
    types = {tensor.name: tensor.type_name for tensor in header.tensors}
    return GgufModel(path, _keys(header), specs, types, Checkpoint(tensors, [path]))


def _first_part(path: Path) -> str:
    return _LAST_PART.sub(lambda match: f"-00001-of-{match[2]}", path.stem) + path.suffix


def _rows(tensor: TensorInfo) -> int:
    rows = 1
    for size in tensor.shape[:-1]:
        rows *= size
    return rows


def _stored(header: Header, tensor: TensorInfo) -> StoredTensor:
    offset = header.data_offset + tensor.offset
    dtype = tensor.type_name.upper()
    stored = StoredTensor(tensor.name, dtype, tensor.shape, header.path, offset, tensor.nbytes)
    if dtype in DTYPE_BYTES:
        return stored
    return DecodedTensor(
        tensor.name, "F32", tensor.shape, header.path, offset, tensor.nbytes, Blocks(stored, tensor.type_name),
        block_type=tensor.type_name,
    )  # fmt: skip


def _keys(header: Header) -> KeyTable:
    keys = KeyTable()
    for key, content in header.metadata.items():
        if key not in _SPLIT and key != CARD_KEY:  # the card of the source is not that of the result
            keys.values[key] = Value(header.types[key], _carried(content), header.item_types.get(key))
    return keys


def _carried(content: object) -> object:
    # llama-quantize passes strings on as C does: what follows a zero byte is lost
    if isinstance(content, str):
        return content.partition("\0")[0]
    if isinstance(content, list) and content and isinstance(content[0], str):
        return [text.partition("\0")[0] for text in content]
    return content
