"""Which tokens each slot of the KV cache holds, and which slot a new prompt should get. Pure bookkeeping.

A slot is one of llama.cpp's sequences. It keeps its tokens after its request has ended, as a prefix for later prompts;
a prompt can also take a prefix from a slot that is busy, by a copy. Slots share within a scope only.
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
_COPY_COST = 32  # tokens that could be computed while a slot is copied


def _no_tokens() -> Tokens:
    return np.empty(0, np.int32)


@dataclass(slots=True)
class Slot:
    """One sequence's share of the KV cache; `tokens[:length]` are in it."""

    index: int
    tokens: Tokens = field(default_factory=_no_tokens)
    length: int = 0
    scope: str = ""
    busy: bool = False
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a sequence goes: `slot` holds its first `cached` tokens once it is a copy of `donor`, if any, and cut."""

    slot: Slot
    cached: int
    donor: Slot | None = None
    evicted: Tokens = field(default_factory=_no_tokens)  # what the slot holds until then, if it loses something
    evicted_scope: str = ""
    evicted_elsewhere: int = 0  # leading tokens of it that another slot holds, too


class KvCache:
    """The slots."""

    def __init__(
        self, slots: int, *, can_rewind: bool = True, capacity: int | None = None, reuses: bool = True
    ) -> None:
        """Start empty.

        `can_rewind`: whether a slot can be cut back to any shorter length. `capacity`: tokens of all slots together, if
        they share one store; None when each slot has its own. `reuses`: whether prefixes are reused at all.
        """
        self._reuses = reuses
        self.slots = [Slot(index) for index in range(slots)]
        self.can_rewind = can_rewind
        self.capacity = capacity
        self._uses = 0

    @property
    def has_idle(self) -> bool:
        """Whether a slot is free to take."""
        return any(not slot.busy for slot in self.slots)

    @property
    def tokens_in_use(self) -> int:
        """Tokens of running sequences; what idle slots keep as prefixes can be given up at any time."""
        return sum(slot.length for slot in self.slots if slot.busy)

    def longest_prefix(self, known: Tokens, scope: str = "") -> int:
        """Return how many leading tokens of `known` some slot holds, one being left to compute."""
        return max(self._reusable(slot, known, scope) for slot in self.slots)

    def take(self, tokens: Tokens, n_known: int, scope: str = "", *, reuse: bool = True) -> Placement:
        """Make the best idle slot busy with a sequence.

        Best is what saves the most tokens: of a prefix that the slot holds or can copy, less what is worth keeping of
        the slot's own content, and weighed against gaps between busy slots. `tokens` is the sequence's own array, which
        goes on growing; its first `n_known` are there. At least one is left to compute, and all without `reuse`. The
        caller must copy the donor's memory and cut the slot's to `cached`. Raises ValueError when no slot is idle.
        """
        idle = [slot for slot in self.slots if not slot.busy]
        known = tokens[:n_known]
        reusable = {slot.index: self._reusable(slot, known, scope) if reuse else 0 for slot in self.slots}
        donor = max(self.slots, key=lambda slot: (reusable[slot.index], not slot.busy, -slot.index))
        copied = reusable[donor.index] - _COPY_COST

        def worth(slot: Slot) -> tuple[float, int]:
            own = reusable[slot.index]
            saved, kept = (copied, 0) if copied > own else (own, own)
            return saved - self._loss(slot, kept) + self._neighbour_worth(slot), -slot.last_used

        slot = max(idle, key=worth)
        cached = reusable[slot.index]
        copy = copied > cached and donor is not slot
        if copy:
            cached = reusable[donor.index]
        evicted = slot.tokens[: slot.length] if slot.length > reusable[slot.index] else _no_tokens()
        elsewhere = self._held_elsewhere(slot, evicted)
        placement = Placement(slot, cached, donor if copy else None, evicted, slot.scope, elsewhere)
        slot.busy, slot.tokens, slot.length, slot.scope = True, tokens, cached, scope
        return placement

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

    def _reusable(self, slot: Slot, known: Tokens, scope: str) -> int:
        if slot.scope != scope or not slot.length or not self._reuses:
            return 0
        common = common_prefix(slot.tokens[: slot.length], known)
        if self.can_rewind:
            return min(common, len(known) - 1)
        return common if common == slot.length < len(known) else 0

    def _held_elsewhere(self, slot: Slot, evicted: Tokens) -> int:
        if not len(evicted) or self.capacity is not None:  # in one store, all idle slots may be emptied at once
            return 0
        others = (other for other in self.slots if other is not slot and other.scope == slot.scope)
        if not self.can_rewind:  # a longer one is of no use
            others = (other for other in others if other.length == len(evicted))
        longest = max((common_prefix(other.tokens[: other.length], evicted) for other in others), default=0)
        return longest if self.can_rewind or longest == len(evicted) else 0

    def _loss(self, slot: Slot, kept: int) -> float:
        """Return how many tokens taking a slot will cost later: what it loses, the less the longer it was not used."""
        age = (self._uses - slot.last_used) / len(self.slots)
        return float((slot.length - kept) * 0.5 ** (1 + age))

    def _neighbour_worth(self, slot: Slot) -> int:
        if self.capacity is not None:
            return 0  # one store: all sequences are computed together
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
