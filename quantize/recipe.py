"""The recipes: named mixtures of tensor types, such as Q4_K_M. A new one is a line of the table. Pure."""

from __future__ import annotations

import dataclasses

from app.errors import UsageError


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


def find(name: str) -> Recipe:
    """Return the recipe of this name, in upper or lower case. Raises `UsageError` that lists the known ones."""
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise UsageError(f"unknown type {name!r}; known types: {', '.join(RECIPES)}", param="type")
    return recipe
