"""Which tokens each slot of the KV cache holds, and which slot a new prompt should get. Pure bookkeeping.

The cache is partitioned: a slot is one of llama.cpp's sequences with a share of its own. A slot keeps its tokens after
its request has ended, as a prefix for a later prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Tokens = npt.NDArray[np.int32]

# llama.cpp computes sequences together only if their numbers are consecutive; each gap costs one more pass over the
# weights a step. Filling a gap is therefore worth as much as this many tokens of cached prefix.
_NEIGHBOUR_WORTH = 64


def _no_tokens() -> Tokens:
    return np.empty(0, np.int32)


@dataclass(slots=True)
class Slot:
    """One sequence's share of the KV cache; `tokens[:length]` are in it."""

    index: int
    tokens: Tokens = field(default_factory=_no_tokens)
    length: int = 0
    busy: bool = False
    last_used: int = 0


class KvCache:
    """The slots."""

    def __init__(self, slots: int, *, can_rewind: bool = True) -> None:
        """Start empty. `can_rewind`: whether a slot can be cut back to any shorter length."""
        self.slots = [Slot(index) for index in range(slots)]
        self._can_rewind = can_rewind
        self._uses = 0

    @property
    def has_idle(self) -> bool:
        """Whether a slot is free to take."""
        return any(not slot.busy for slot in self.slots)

    @property
    def tokens_in_use(self) -> int:
        """Tokens of running sequences; what idle slots keep as prefixes can be given up at any time."""
        return sum(slot.length for slot in self.slots if slot.busy)

    def take(self, tokens: Tokens, prompt_length: int) -> tuple[Slot, int]:
        """Make the best idle slot busy with a sequence; return it and how many tokens of its prompt it holds already.

        Best is the longest reusable prefix, weighed against gaps between busy slots, then the least recently used.
        `tokens` is the sequence's own array, which goes on growing; its first `prompt_length` are the prompt. At least
        one prompt token is left to compute. The caller must cut the slot's memory to the returned length. Raises
        ValueError when no slot is idle.
        """
        idle = [slot for slot in self.slots if not slot.busy]
        prompt = tokens[:prompt_length]
        reusable = {slot.index: self._reusable(slot, prompt) for slot in idle}
        best = max(idle, key=lambda slot: (reusable[slot.index] + self._neighbour_worth(slot), -slot.last_used))
        best.busy = True
        best.tokens = tokens
        best.length = reusable[best.index]
        return best, best.length

    def release(self, slot: Slot) -> None:
        """Make a slot idle; its tokens stay as a prefix for others."""
        self._uses += 1
        slot.busy, slot.last_used = False, self._uses

    def clear(self, slot: Slot) -> None:
        """Note that a slot's memory was emptied; a busy slot stays busy."""
        slot.length = 0

    def differences(self, lengths: Sequence[int]) -> list[str]:
        """Compare with what llama.cpp says each slot holds; return one line for each slot that differs."""
        return [
            f"slot {slot.index}: {slot.length} tokens in the books, {length} in llama.cpp's memory"
            for slot, length in zip(self.slots, lengths, strict=True)
            if slot.length != length
        ]

    def _reusable(self, slot: Slot, prompt: Tokens) -> int:
        common = common_prefix(slot.tokens[: slot.length], prompt)
        if self._can_rewind:
            return min(common, len(prompt) - 1)
        return common if common == slot.length < len(prompt) else 0

    def _neighbour_worth(self, slot: Slot) -> int:
        neighbours = (slot.index - 1, slot.index + 1)
        return _NEIGHBOUR_WORTH * sum(0 <= i < len(self.slots) and self.slots[i].busy for i in neighbours)


def common_prefix(left: Tokens, right: Tokens) -> int:
    """Return how many leading tokens are the same."""
    length = min(len(left), len(right))
    if length == 0:
        return 0
    different = left[:length] != right[:length]
    first = int(different.argmax())
    return first if different[first] else length
