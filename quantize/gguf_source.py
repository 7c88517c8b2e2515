"""An existing GGUF, in one file or in parts, as a source: quantized as llama-quantize does it.

Its keys are carried over. What is f32, f16 or bf16 loses nothing but what the new type costs. What is quantized already
is widened to f32 by ggml first, which adds one error to another: that needs the user's consent.
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
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")


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
    """Read a GGUF's header, or those of all its parts when given the first: `NAME-00001-of-00003.gguf`.

    Raises `ModelFileError` for a file that is damaged or oddly aligned, for another part than the first, and for parts
    that do not belong together.
    """
    headers = _read_parts(path)
    found = [(header, tensor) for header in headers for tensor in header.tensors]
    for header in headers:
        if header.alignment != DEFAULT_ALIGNMENT:
            raise ModelFileError(f"{header.path}: general.alignment is {header.alignment}; {DEFAULT_ALIGNMENT} is read")
    if not found:
        raise ModelFileError(f"{path}: holds no tensors, only a header")
    tensors: dict[str, StoredTensor] = {}
    for header, tensor in found:
        if tensor.name in tensors:
            where = tensors[tensor.name].shard.name
            raise ModelFileError(f"{header.path}: the tensor {tensor.name!r} is also in {where}")
        tensors[tensor.name] = _stored(header, tensor)
    specs = [
        TensorSpec(tensor.name, tensor.shape, (Part(tensor.name, _rows(tensor), tensor.shape[-1]),))
        for _, tensor in found
    ]
    types = {tensor.name: tensor.type_name for _, tensor in found}
    return GgufModel(path, _keys(headers[0]), specs, types, Checkpoint(tensors, [header.path for header in headers]))


def _read_parts(path: Path) -> list[Header]:
    first = read_header(path)
    count = first.integer("split.count") or 1
    if count == 1:
        return [first]
    match = _PART.search(path.stem)
    if match is None or int(match[2]) != count:
        raise ModelFileError(f"{path}: one of {count} parts; such a file is called NAME-00001-of-{count:05}.gguf")
    names = [f"{path.stem[: match.start()]}-{number:05}-of-{match[2]}{path.suffix}" for number in range(1, count + 1)]
    if int(match[1]) != 1:
        raise ModelFileError(f"{path}: part {int(match[1])} of {count}; give the first, {names[0]}")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise ModelFileError(f"{path}: part 1 of {count}; missing beside it: {', '.join(missing[:5])}")
    headers = [first, *(read_header(path.parent / name) for name in names[1:])]
    total = sum(len(header.tensors) for header in headers)
    for number, header in enumerate(headers):
        stated = [header.integer(key) for key in _SPLIT]
        if stated != [number, count, total]:
            raise ModelFileError(
                f"{header.path}: {', '.join(_SPLIT)} are {stated}; they must be {[number, count, total]} in part "
                f"{number + 1} of {count} with {total} tensors in all"
            )
    return headers


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
