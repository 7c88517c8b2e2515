"""The recipes: named mixtures of tensor types, such as Q4_K_M, and what the user changes in them. Pure.

A new recipe is a line of the table.
"""

from __future__ import annotations

import dataclasses
import re

from app.errors import UsageError
from app.models.gguf_types import TENSOR_TYPES


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """A name that people type, llama.cpp's number for it, and the type that unquantized matrices take.

    A quantized recipe goes through bf16, as upstream's two steps do: llama.cpp then chooses each tensor's type.
    """

    name: str
    file_type: int
    float_type: str
    quantized: bool

    @property
    def label(self) -> str:
        """As it stands in file names: `Q4_K_M`."""
        return self.name.upper()


_FLOATS = (("f32", 0), ("f16", 1), ("bf16", 32))
_QUANTIZED = (
    ("q8_0", 7),
    ("q6_k", 18),
    ("q5_k_m", 17),
    ("q5_k_s", 16),
    ("q5_1", 9),
    ("q5_0", 8),
    ("q4_k_m", 15),
    ("q4_k_s", 14),
    ("q4_1", 3),
    ("q4_0", 2),
    ("iq4_nl", 25),
    ("iq4_xs", 30),
    ("q3_k_m", 12),
    ("q2_k", 10),
    ("mxfp4_moe", 38),  # experts in MXFP4, everything else in Q8_0
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(Recipe(name, file_type, "bf16", quantized=True) for name, file_type in _QUANTIZED),
        *(Recipe(name, file_type, name, quantized=False) for name, file_type in _FLOATS),
    )
}

# what ggml encodes: not its formats for activations, and no integers
_NOT_FOR_WEIGHTS = {"q8_1", "q8_K", "i8", "i16", "i32", "i64", "f64", "nvfp4", "q1_0", "q2_0"}
ENCODED_TYPES: dict[str, str] = {
    name.lower(): name for name, _, _ in TENSOR_TYPES.values() if name not in _NOT_FOR_WEIGHTS
}
NEEDS_IMPORTANCE = {"iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s"}  # which are useless without a matrix

_MAX_PATTERN = 1000  # C++'s regular expressions are compiled by recursion


@dataclasses.dataclass(frozen=True, slots=True)
class Overrides:
    """What the user decides about tensor types; the recipe decides the rest.

    `tensors` are pairs of a regular expression and ggml's name of a type; the first that is found in a tensor's name
    counts. `output` is the type of the output matrix, `embedding` that of the token embeddings.
    """

    tensors: tuple[tuple[str, str], ...] = ()
    output: str | None = None
    embedding: str | None = None

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.tensors or self.output or self.embedding)


NO_OVERRIDES = Overrides()


def tensor_type(name: str, flag: str) -> str:
    """Return ggml's name of a tensor type, given in any case. Raises `UsageError` that lists the known ones."""
    found = ENCODED_TYPES.get(name.lower())
    if found is None:
        known = ", ".join(ENCODED_TYPES)
        raise UsageError(f"--{flag}: unknown tensor type {name!r}; known types: {known}", param=flag)
    return found


def override(text: str) -> tuple[str, str]:
    """Take `PATTERN=TYPE` apart into a regular expression and a type.

    The pattern means what it means to llama-quantize: a regular expression in lower case, searched anywhere in the
    name. One that begins with `*` or `?`, which no regular expression does, is a shell pattern of the whole name, where
    `.weight` may be left out at the end.
    """
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--tensor-type: {text!r} is not PATTERN=TYPE, such as ffn_down=q6_k", param="tensor-type")
    if len(pattern) > _MAX_PATTERN:
        raise UsageError(f"--tensor-type: the pattern is longer than {_MAX_PATTERN} letters", param="tensor-type")
    pattern = pattern.lower()
    if pattern[0] in "*?":
        wild = {"*": ".*", "?": "."}
        pattern = "^" + "".join(wild.get(letter) or re.escape(letter) for letter in pattern) + r"(\.weight)?$"
    return pattern, tensor_type(name, "tensor-type")


def find(name: str) -> Recipe:
    """Return the recipe of this name, in upper or lower case. Raises `UsageError` that lists the known ones."""
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise UsageError(f"unknown type {name!r}; known types: {', '.join(RECIPES)}", param="type")
    return recipe
