"""The recipes: named mixtures of tensor types, such as Q4_K_M. A new one is a line of the table. Pure."""

from __future__ import annotations

import dataclasses

from app.errors import UsageError


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """A name that people type, llama.cpp's number for it, and the 16-bit type that unquantized matrices take.

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


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("q4_0", 2, "bf16", quantized=True),
        Recipe("q4_k_m", 15, "bf16", quantized=True),
        Recipe("q8_0", 7, "bf16", quantized=True),
        Recipe("f16", 1, "f16", quantized=False),
        Recipe("bf16", 32, "bf16", quantized=False),
    )
}


def find(name: str) -> Recipe:
    """Return the recipe of this name, in upper or lower case. Raises `UsageError` that lists the known ones."""
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise UsageError(f"unknown type {name!r}; known types: {', '.join(RECIPES)}", param="type")
    return recipe
