"""Counts a model's weights, the experts of a mixture apart. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from quantize.model_names import size_label
from quantize.tensors import TensorSpec


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSize:
    """How many weights there are: all, and those that are left if every stack of experts were one expert.

    `experts` is the length of a stack, 0 without any.
    """

    weights: int
    with_one_expert: int
    experts: int

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> ModelSize:
        """Count the weights of tensors; stacks of experts are known by their names."""
        weights = with_one = stacked = stacks = 0
        for spec in specs:
            weights += spec.weights
            if "_exps." in spec.name and len(spec.shape) >= 3:
                experts = spec.shape[-3]
                with_one += spec.weights // experts
                stacked += experts
                stacks += 1
            else:
                with_one += spec.weights
        return cls(weights, with_one, stacked // stacks if stacks else 0)

    @property
    def label(self) -> str:
        """The size as people write it: `1.2B`, `8x7.4B`."""
        return f"{self.experts}x{size_label(self.with_one_expert)}" if self.experts else size_label(self.weights)
