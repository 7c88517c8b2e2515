"""Asks llama.cpp for the type of every tensor, on a draft of the file that has no weights."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from app.errors import StorageError, UsageError
from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS, TENSOR_TYPES
from quantize.header import KeyTable
from quantize.plan import Plan, draft_types, make_plan
from quantize.recipe import NO_OVERRIDES, Overrides, Recipe
from quantize.tensors import TensorSpec

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"


def decide_types(
    keys: KeyTable,
    specs: Sequence[TensorSpec],
    recipes: Sequence[Recipe],
    overrides: Overrides = NO_OVERRIDES,
    *,
    with_importance: bool = False,
    types: Mapping[str, str] | None = None,
) -> dict[str, dict[str, str]]:
    """Return for each quantized recipe's name llama.cpp's choices: tensor name → type name.

    `types` are the tensors' types now, by default those of upstream's intermediate file.

    Raises `UsageError` for an override that reaches no tensor, or whose type the tensor's rows cannot hold, and
    `ModelFileError` if llama.cpp refuses the hyper-parameters.
    """
    quantized = [recipe for recipe in recipes if recipe.quantized]
    if not quantized:
        return {}
    _check_rows(specs, overrides)
    draft = make_plan(keys, specs, types or draft_types(specs, quantized[0].float_type))
    with _sparse_file(draft) as path:
        for pattern, _ in overrides.tensors:
            _check_reach(path, pattern)
        choices = quantizer.Choices(
            tuple((pattern, TENSOR_TYPE_NUMBERS[name]) for pattern, name in overrides.tensors),
            TENSOR_TYPE_NUMBERS[overrides.output] if overrides.output else None,
            TENSOR_TYPE_NUMBERS[overrides.embedding] if overrides.embedding else None,
        )
        return {
            recipe.name: quantizer.select_types(path, recipe.file_type, choices, with_importance=with_importance)
            for recipe in quantized
        }


def _check_reach(path: Path, pattern: str) -> None:
    if not quantizer.find_tensors(path, pattern):
        raise UsageError(
            f"--tensor-type: no tensor that can be quantized has a name with {pattern!r}", param="tensor-type"
        )


def _check_rows(specs: Sequence[TensorSpec], overrides: Overrides) -> None:
    # llama.cpp falls back to other types by itself, but not here: it would end the process
    for flag, type_name, names in (
        ("output-tensor-type", overrides.output, (_OUTPUT,)),
        ("token-embedding-type", overrides.embedding, _EMBEDDINGS),
    ):
        block = TENSOR_TYPES[TENSOR_TYPE_NUMBERS[type_name]][1] if type_name else 1
        for spec in specs:
            if spec.name in names and spec.row_weights % block:
                raise UsageError(
                    f"--{flag}: {spec.name} cannot be {type_name}: its rows of {spec.row_weights} are no multiple of "
                    f"{block}",
                    param=flag,
                )


@contextlib.contextmanager
def _sparse_file(draft: Plan) -> Iterator[Path]:
    """Make the draft a file of its full size that takes no room: only the header is there. On Linux it has no name."""
    try:
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("pestle-draft", os.MFD_CLOEXEC)
            with os.fdopen(file, "wb") as stream:
                _fill(file, draft)
                yield Path(f"/proc/self/fd/{stream.fileno()}")
            return
        with tempfile.NamedTemporaryFile(prefix="pestle-draft-") as stream:
            _fill(stream.fileno(), draft)
            yield Path(stream.name)
    except OSError as error:
        raise StorageError(f"{tempfile.gettempdir()}: no temporary file can be made: {error}") from error


def _fill(file: int, draft: Plan) -> None:
    os.write(file, draft.header)
    os.ftruncate(file, draft.file_size)
