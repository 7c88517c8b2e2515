"""Plans the file: every tensor's type, place and size, before any weight is read. Pure.

The types of a quantized recipe are llama.cpp's own decision, taken on a draft without weights (see `pipeline`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from app.errors import CheckpointError, UsageError
from app.models.gguf_types import TENSOR_TYPE_NUMBERS, TENSOR_TYPES
from quantize.header import KeyTable, TensorEntry, Value, aligned, encode_header
from quantize.recipe import RECIPES, Recipe
from quantize.tensors import TensorSpec

_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor with its type and its place; `offset` counts from the start of the data, sizes are bytes."""

    spec: TensorSpec
    type_name: str
    offset: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """The bytes of all its rows, without padding."""
        return self.spec.rows * self.row_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The whole file: `header`, then the tensors in order, each padded to the alignment."""

    header: bytes
    tensors: list[PlannedTensor]
    file_size: int

    def by_type(self) -> dict[str, tuple[int, int, int]]:
        """Return type name → number of tensors, weights, bytes; the type with the most bytes first."""
        tensors, weights, sizes = Counter[str](), Counter[str](), Counter[str]()
        for tensor in self.tensors:
            tensors[tensor.type_name] += 1
            weights[tensor.type_name] += tensor.spec.weights
            sizes[tensor.type_name] += tensor.nbytes
        return {name: (tensors[name], weights[name], size) for name, size in sizes.most_common()}


def draft_types(specs: Iterable[TensorSpec], float_type: str) -> dict[str, str]:
    """Return each tensor's type before quantization: what it is already, F32, or the 16-bit type."""
    return {spec.name: spec.stored_type or ("f32" if spec.keep_f32 else float_type) for spec in specs}


def llama_cpp_order(name: str) -> tuple[int, bytes]:
    """Order tensors as llama.cpp writes them: what is outside of the blocks, then block by block, by name."""
    match = _BLOCK.match(name)
    return (int(match[1]) if match else -1, name.encode())


def make_plan(keys: KeyTable, specs: Iterable[TensorSpec], types: Mapping[str, str]) -> Plan:
    """Lay the tensors out in the order given. Raises `CheckpointError` for a row that its type cannot hold."""
    tensors: list[PlannedTensor] = []
    offset = 0
    for spec in specs:
        tensor = PlannedTensor(spec, types[spec.name], offset, _row_bytes(spec, types[spec.name]))
        tensors.append(tensor)
        offset = aligned(offset + tensor.nbytes)
    header = encode_header(
        keys, (TensorEntry(tensor.spec.name, tensor.spec.shape, tensor.type_name, tensor.offset) for tensor in tensors)
    )
    return Plan(header, tensors, len(header) + offset)


def plan_file(
    keys: KeyTable,
    specs: Iterable[TensorSpec],
    recipe: Recipe,
    decided: Mapping[str, str],
    more: Mapping[str, Value] = {},
) -> Plan:
    """Plan a recipe's file. `decided` holds llama.cpp's choice for each tensor of a quantized recipe.

    `more` are keys that only quantized files have, at the end.
    """
    if not recipe.quantized:
        specs = list(specs)
        types = draft_types(specs, recipe.float_type)
        named = RECIPES["mxfp4_moe"] if "mxfp4" in types.values() else recipe  # as upstream, whatever the rest is
        return make_plan(keys.with_file_type(named.file_type), specs, types)
    ordered = sorted((_without_ones(spec) for spec in specs), key=lambda spec: llama_cpp_order(spec.name))
    missing = [spec.name for spec in ordered if spec.name not in decided]
    if missing:
        raise CheckpointError(f"llama.cpp chose no type for {', '.join(missing[:5])}")
    table = keys.quantized(recipe.file_type)
    table.values |= more
    return make_plan(table, ordered, decided)


def check_originals(specs: Iterable[TensorSpec], decided: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `UsageError` if a tensor that is quantized in the checkpoint would be quantized again, to another type.

    `decided` holds llama.cpp's choices for each recipe.
    """
    stored = {spec.name: spec.stored_type for spec in specs if spec.stored_type}
    for recipe, types in decided.items():
        for name, type_name in stored.items():
            wanted = types.get(name, type_name)
            if wanted != type_name:
                raise UsageError(
                    f"the tensor {name!r} is {type_name} in the checkpoint; to make it {wanted} for "
                    f"{recipe.upper()} adds one error to another. {type_name}_moe keeps its bits; --allow-requantize "
                    "does it nevertheless",
                    param="allow-requantize",
                )


def _without_ones(spec: TensorSpec) -> TensorSpec:
    # ggml counts no dimension whose slower ones are all 1, and llama.cpp writes what ggml counts
    shape = spec.shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return spec if shape == spec.shape else dataclasses.replace(spec, shape=shape)


def _row_bytes(spec: TensorSpec, type_name: str) -> int:
    _, block_weights, block_bytes = TENSOR_TYPES[TENSOR_TYPE_NUMBERS[type_name]]
    if spec.row_weights % block_weights or not math.prod(spec.shape):
        raise CheckpointError(
            f"the tensor {spec.name!r} of shape {spec.shape} cannot be {type_name}: its rows are no multiple "
            f"of {block_weights}"
        )
    return spec.row_weights // block_weights * block_bytes
