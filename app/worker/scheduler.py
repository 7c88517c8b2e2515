"""Decides what the next `llama_decode` computes. Pure: no clock, no I/O, no llama.cpp.

Each sequence has tokens that are known and not yet computed. Those that lack one token are computed together, then
prompts get a chunk, in turns: in a partitioned cache llama.cpp splits a mixed batch into several passes, which together
take longer than two batches of one kind (docs/adr/0002). A turn's prompt tokens are bounded by a target time.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.worker.kv import KvCache, Slot
    from app.worker.sequence import Sequence

_TARGET_STEP_SECONDS = 0.2  # what prompts may cost the other streams, a cancellation, and whoever comes next
_LEAST_CHUNK = 32  # tokens of one prompt that are worth a pass over the weights
_SHORT_REST = 64  # tokens of a prompt that are not worth leaving: a pass of their own would cost a tenth more
_WEIGHT_OF_NEWEST = 0.3
_LEAST_MEASURED = 16  # tokens; smaller chunks say more about overhead than about speed


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + count) of one sequence; `wants_logits` when they are its last known ones."""

    sequence: Sequence
    slot: Slot
    start: int
    count: int
    wants_logits: bool


@dataclass(slots=True)
class Schedule:
    """What one step computes."""

    chunks: list[Chunk] = field(default_factory=list)  # by slot: llama.cpp wants consecutive sequences together
    prompt_tokens: int = 0


class PromptBudget:
    """How many prompt tokens a step may hold: as many as fit into the target time."""

    def __init__(self, target_seconds: float = _TARGET_STEP_SECONDS) -> None:
        """Start without a measurement, that is with the smallest chunk."""
        self._target = target_seconds
        self._seconds_per_token: float | None = None

    def observe(self, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that held this many prompt tokens."""
        if prompt_tokens < _LEAST_MEASURED:
            return
        measured = seconds / prompt_tokens
        if self._seconds_per_token is None:
            self._seconds_per_token = measured
        else:
            self._seconds_per_token += _WEIGHT_OF_NEWEST * (measured - self._seconds_per_token)

    def tokens(self) -> int:
        """Return the number of prompt tokens for a step."""
        if self._seconds_per_token is None:
            return _LEAST_CHUNK
        return max(_LEAST_CHUNK, int(self._target / max(self._seconds_per_token, 1e-9)))


class Scheduler:
    """The waiting and the running sequences, in their order of arrival."""

    def __init__(self, cache: KvCache, batch_size: int, budget: PromptBudget | None = None) -> None:
        """Schedule onto the cache's slots, at most `batch_size` tokens a step (at least one a slot)."""
        if batch_size < len(cache.slots):
            raise ValueError(f"a batch of {batch_size} tokens is smaller than the {len(cache.slots)} slots")
        self.cache = cache
        self.budget = budget or PromptBudget()
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []
        self._batch_size = batch_size
        self._prompts_are_next = False

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def find(self, request: int) -> Sequence | None:
        """Return the waiting or running sequence of a request."""
        for sequences in (self.running, self.waiting):
            for sequence in sequences:
                if sequence.request == request:
                    return sequence
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or cancelled sequence out; its slot becomes idle and keeps the computed tokens."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.cache.release(sequence.slot)
        sequence.slot = None

    def admit(self) -> list[Sequence]:
        """Give idle slots to waiting sequences; return those that got one.

        The caller cuts each slot's memory to the sequence's `n_cached`, or calls `forget_prefix` when it can't.
        """
        admitted: list[Sequence] = []
        while self.waiting and self.cache.has_idle:
            sequence = self.waiting.popleft()
            slot, cached = self.cache.take(sequence.tokens, sequence.n_prompt)
            sequence.slot, sequence.n_cached, sequence.n_computed = slot, cached, cached
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def forget_prefix(self, sequence: Sequence) -> None:
        """Compute a sequence's prompt from its start: its slot's memory was emptied."""
        sequence.n_cached = sequence.n_computed = 0
        if sequence.slot is not None:
            self.cache.clear(sequence.slot)

    def schedule(self) -> Schedule:
        """Choose what the next step computes: one token of each stream, or chunks of prompts."""
        decoding = [sequence for sequence in self.running if sequence.n_pending == 1]
        prompts = [sequence for sequence in self.running if sequence.n_pending > 1]
        turn_of_prompts = bool(prompts) and (self._prompts_are_next or not decoding)
        self._prompts_are_next = not turn_of_prompts
        if turn_of_prompts:
            counts = _share(prompts, min(self._batch_size, self.budget.tokens()), self._batch_size)
        else:
            counts = [(sequence, 1) for sequence in (*decoding, *_between(decoding, prompts))]
        schedule = Schedule()
        for sequence, count in counts:
            if sequence.slot is not None:
                start = sequence.n_computed
                wants_logits = start + count == sequence.n_tokens
                schedule.chunks.append(Chunk(sequence, sequence.slot, start, count, wants_logits))
                if start < sequence.n_prompt:
                    schedule.prompt_tokens += count
        schedule.chunks.sort(key=lambda chunk: chunk.slot.index)
        return schedule

    def advance(self, chunks: list[Chunk]) -> None:
        """Note that these chunks are computed."""
        for chunk in chunks:
            chunk.sequence.n_computed = chunk.slot.length = chunk.start + chunk.count


def _share(prompts: list[Sequence], budget: int, room: int) -> list[tuple[Sequence, int]]:
    """Split a step's tokens: a chunk for the oldest prompt, so that none starves, and the rest for those soonest done.

    A rest that isn't worth a pass of its own is computed at once: over the `budget`, but never over the `room`.
    """
    oldest = prompts[0]
    counts = {oldest.request: min(oldest.n_pending, _LEAST_CHUNK, budget)}
    budget -= counts[oldest.request]
    room -= counts[oldest.request]
    for sequence in sorted(prompts, key=lambda sequence: sequence.n_pending):
        pending = sequence.n_pending - counts.get(sequence.request, 0)
        if budget < _LEAST_CHUNK and sequence is not oldest:
            continue
        more = pending if pending < min(max(budget, 0) + _SHORT_REST, room + 1) else max(budget, 0)
        counts[sequence.request] = counts.get(sequence.request, 0) + more
        budget -= more
        room -= more
    return [(sequence, counts[sequence.request]) for sequence in prompts if sequence.request in counts]


def _between(streams: list[Sequence], prompts: list[Sequence]) -> list[Sequence]:
    """Return the prompts whose slots lie between the streams': a token of each closes a gap, which costs a pass."""
    taken = sorted(sequence.slot.index for sequence in streams if sequence.slot)
    return [prompt for prompt in prompts if prompt.slot and taken and taken[0] < prompt.slot.index < taken[-1]]
