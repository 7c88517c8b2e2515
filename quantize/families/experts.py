"""Mixtures of experts: the stacks that ggml wants, made an expert at a time of either layout of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from app.errors import CheckpointError
from quantize.families.config import Config
from quantize.families.mapping import Want

MOST_EXPERTS = 1024  # llama.cpp's LLAMA_MAX_EXPERTS


@dataclasses.dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a layer: how many there are, and their sizes in weights."""

    count: int
    hidden: int
    feed_forward: int

    @classmethod
    def read(cls, config: Config, name: str, hidden: int, feed_forward: int) -> Experts:
        """Read the number of experts from the field `name`. Raises `CheckpointError` if llama.cpp cannot take it."""
        count = config.count(name)
        if count > MOST_EXPERTS:
            raise CheckpointError(f"{config.path}: {name} is {count}; llama.cpp takes at most {MOST_EXPERTS} experts")
        return cls(count, hidden, feed_forward)

    def router(self, target: str, source: str) -> Want:
        """Return the layer's router, F32 (experts, hidden)."""
        return Want(f"{target}.ffn_gate_inp.weight", source, (self.count, self.hidden))

    def separate(self, target: str, names: Mapping[str, str]) -> Iterator[Want]:
        """Stack experts that are stored as matrices of their own.

        `names` says for each stack, such as `ffn_down_exps`, the name of an expert's matrix with `{}` for its number.
        The order is that in which upstream writes the stacks, all after the last of the layer's experts.
        """
        sources = {stack: tuple(name.format(expert) for expert in range(self.count)) for stack, name in names.items()}
        every = tuple(name for stack in sources.values() for name in stack)
        for stack, experts in sources.items():
            yield Want(f"{target}.{stack}.weight", experts, self._shape(stack), after=every)

    def fused(self, target: str, gate_up: str, down: str) -> Iterator[Want]:
        """Part stacks of gates over ups, (experts, 2 * feed forward, hidden); those of downs are as ggml wants them."""
        both = (self.count, 2 * self.feed_forward, self.hidden)
        for half, stack in enumerate(("ffn_gate_exps", "ffn_up_exps")):
            starts = tuple((2 * expert + half) * self.feed_forward for expert in range(self.count))
            shape = (self.count, *self._shape(stack))
            yield Want(f"{target}.{stack}.weight", (gate_up,) * self.count, both, shape, start=starts)
        yield Want(f"{target}.ffn_down_exps.weight", down, (self.count, *self._shape("ffn_down_exps")))

    def _shape(self, stack: str) -> tuple[int, int]:
        """Return an expert's shape within a stack."""
        wide = (self.feed_forward, self.hidden)
        return wide[::-1] if stack == "ffn_down_exps" else wide
