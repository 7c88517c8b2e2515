"""Decides what the next `llama_decode` computes. Pure: no clock, no I/O, no llama.cpp.

Each sequence has tokens that are known and not yet computed. Those that lack one token are computed together, then
prompts get a chunk, in turns: in a partitioned cache llama.cpp splits a mixed batch into several passes, which together
take longer than two batches of one kind (docs/adr/0002). A turn's prompt tokens are bounded by the streams' pace. The
streams may bring guesses of what follows their tokens (docs/adr/0006), which the caller verifies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.worker.budget import LEAST_CHUNK, FixedBudget, StepBudget
from app.worker.fair_shares import FairShares
from app.worker.kv import common_prefix

if TYPE_CHECKING:
    from app.worker.kv import KvCache, Placement, Slot
    from app.worker.sequence import Sequence
    from app.worker.speculation import Speculation

_WORTH_WAITING = 64  # tokens that another sequence is about to compute


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + count) of one sequence; `wants_logits` when its last known one is among them.

    The last `guesses` of them are not known: logits are wanted of each, and of the known one before them.
    """

    sequence: Sequence
    slot: Slot
    start: int
    count: int
    wants_logits: bool
    guesses: int = 0
    scores: int = 0  # tokens before these whose logits are wanted for the log probabilities of those that follow

    @property
    def rows(self) -> int:
        """Rows of logits that the chunk brings: those of its last tokens."""
        return self.scores + self.wants_logits + self.guesses


@dataclass(slots=True)
class Schedule:
    """What one step computes."""

    chunks: list[Chunk] = field(default_factory=list)  # by slot: llama.cpp wants consecutive sequences together
    prompt_tokens: int = 0
    guesses: int = 0
    drafted: bool = False  # the guesses are yet to be written, by the draft model
    scoring: bool = False  # a sequence is among them whose prompt has log probabilities


class Scheduler:
    """The waiting and the running sequences."""

    def __init__(
        self,
        cache: KvCache,
        batch_size: int,
        budget: StepBudget | FixedBudget | None = None,
        speculation: Speculation | None = None,
        score_rows: int = 0,
    ) -> None:
        """Schedule onto the cache's slots, at most `batch_size` tokens a step (at least one a slot).

        `speculation` guesses; None: nobody does. It needs a cache that can rewind. `score_rows`: rows of logits that a
        step may have beside those that are drawn from; at least one a slot where prompts have log probabilities.
        """
        if batch_size < len(cache.slots):
            raise ValueError(f"a batch of {batch_size} tokens is smaller than the {len(cache.slots)} slots")
        self.cache = cache
        self.budget = StepBudget() if budget is None else budget
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # in their order of admission
        self.preemptions = 0
        self._shares = FairShares()
        self._batch_size = batch_size
        self._score_rows = score_rows
        self._speculation = speculation
        self._prompts_are_next = False
        self._streams = 1  # in the last step of streams

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.running) or any(sequence.awaits_state is None for sequence in self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)
        self._shares.join(sequence.client)

    def find(self, request: int) -> Sequence | None:
        """Return the waiting or running sequence of a request."""
        for sequences in (self.running, self.waiting):
            for sequence in sequences:
                if sequence.request == request:
                    return sequence
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or cancelled sequence out; its slot becomes idle and keeps the computed tokens."""
        self._shares.leave(sequence.client)
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._leave_slot(sequence)

    def preempt(self, sequence: Sequence) -> Slot:
        """Put a running sequence back among the waiting, to be computed again; return its slot.

        The slot holds nothing now: the caller empties its memory.
        """
        slot = self._leave_slot(sequence)
        self.cache.clear(slot)
        sequence.n_computed = 0
        self.waiting.append(sequence)
        self.preemptions += 1
        return slot

    def youngest(self) -> Sequence:
        """Return the running sequence that is preempted first: of the least urgent, the one that came last."""
        return max(self.running, key=lambda sequence: (sequence.priority, sequence.arrived))

    def admit(self) -> list[tuple[Sequence, Placement]]:
        """Give idle slots to waiting sequences; return those that got one, and where.

        Next is who is most urgent, then whose client was served least, then who came first; a sequence whose prefix is
        just being computed for another waits for that, and holds nobody up. The caller makes each slot's memory what
        the placement says, or calls `forget_prefix` when it can't.
        """
        admitted: list[tuple[Sequence, Placement]] = []
        while self.waiting and self.cache.has_idle and (sequence := self._next_waiting()):
            reuse = sequence.reuses_prefix
            placement = self.cache.take(sequence.tokens, sequence.n_tokens, sequence.scope, reuse=reuse)
            self.waiting.remove(sequence)
            sequence.slot, sequence.n_computed, sequence.awaits = placement.slot, placement.cached, None
            self.running.append(sequence)
            admitted.append((sequence, placement))
        return admitted

    def set_prefix(self, sequence: Sequence, length: int) -> None:
        """Compute a sequence's tokens from this one on: its slot's memory holds those before it."""
        sequence.n_computed = length
        if sequence.slot is not None:
            sequence.slot.length = length

    def schedule(self) -> Schedule:
        """Choose what the next step computes: one token of each stream, perhaps with guesses, or chunks of prompts."""
        decoding = [sequence for sequence in self.running if sequence.n_pending == 1]
        prompts = [sequence for sequence in self.running if sequence.n_pending > 1]
        turn_of_prompts = bool(prompts) and (self._prompts_are_next or not decoding)
        self._prompts_are_next = not turn_of_prompts
        guesses: dict[int, int] = {}
        if turn_of_prompts:
            # a stream whose grammar's mask is late is neither: it has nothing to compute, and waits all the same
            bounds = self.budget.prompt_bounds(undisturbed=len(prompts) == len(self.running))
            budget, room = (min(self._batch_size, bound) for bound in bounds)
            counts = _share(sorted(prompts, key=self._soonest_done), prompts[0], budget, room)
        else:
            counts = [(sequence, 1) for sequence in (*decoding, *_between(decoding, prompts))]
            if (
                self._speculation is not None and not prompts and not self.waiting
            ):  # who would wait for the guesses, too
                room, token_seconds = self._room_for_guesses(len(decoding)), self.budget.prompt_token_seconds
                guesses = self._speculation.guess(decoding, room, token_seconds)
        schedule = Schedule(guesses=sum(guesses.values()))
        if guesses and self._speculation is not None:
            schedule.drafted = self._speculation.source == "draft"
        score_rows = self._score_rows
        for sequence, count in counts:
            if sequence.slot is None:
                continue
            chunk = _chunk(sequence, sequence.slot, count, guesses.get(sequence.request, 0), score_rows)
            score_rows -= chunk.scores
            if not chunk.count:  # others have taken the rows that its log probabilities need
                continue
            schedule.chunks.append(chunk)
            schedule.scoring |= sequence.score is not None
            if chunk.start < sequence.n_prompt:
                schedule.prompt_tokens += chunk.count - chunk.guesses
        schedule.chunks.sort(key=lambda chunk: chunk.slot.index)
        return schedule

    def observe(self, chunks: list[Chunk], seconds: float) -> None:
        """Learn how long a step with these chunks took."""
        tokens = sum(chunk.count for chunk in chunks)
        guesses = sum(chunk.guesses for chunk in chunks)
        if tokens > len(chunks) and not guesses:
            self.budget.observe_prompts(tokens, seconds)
            return
        self.budget.observe_streams(seconds)
        if self._speculation is not None:
            self._streams = len(chunks)
            self._speculation.observe(len(chunks), guesses, seconds)

    def advance(self, chunks: list[Chunk]) -> None:
        """Note that these chunks are computed; those with guesses must be settled before anything else."""
        for chunk in chunks:
            chunk.sequence.n_computed = chunk.slot.length = chunk.start + chunk.count
            self._shares.charge(chunk.sequence.client, chunk.count)

    def settle(self, chunk: Chunk, accepted: int) -> int:
        """Note how many of a chunk's guesses came true; return how many tokens its slot shall be cut to."""
        if self._speculation is not None:
            self._speculation.settle(chunk.sequence, self._streams, chunk.guesses, accepted)
        length = chunk.start + chunk.count - chunk.guesses + accepted
        chunk.sequence.n_computed = chunk.slot.length = length
        return length

    def _room_for_guesses(self, streams: int) -> int:
        """Return how many tokens a step may hold beside the streams' own; no slot loses anything to guesses."""
        room = self._batch_size - streams
        if self.cache.capacity is not None:
            room = min(room, self.cache.capacity - streams - sum(slot.length for slot in self.cache.slots))
        return max(room, 0)

    def _leave_slot(self, sequence: Sequence) -> Slot:
        slot = sequence.slot
        assert slot is not None  # noqa: S101 - it runs
        self.running.remove(sequence)
        self.cache.release(slot)
        sequence.slot = None
        return slot

    def _urgency(self, sequence: Sequence) -> tuple[int, int]:
        return sequence.priority, self._shares.rank(sequence.client)

    def _soonest_done(self, sequence: Sequence) -> tuple[int, int, int]:
        return (*self._urgency(sequence), sequence.n_pending)

    def _next_waiting(self) -> Sequence | None:
        for sequence in sorted(self.waiting, key=lambda sequence: (*self._urgency(sequence), sequence.arrived)):
            if sequence.awaits_state is None and not self._prefix_is_coming(sequence):
                return sequence if self._has_room(sequence) else None  # smaller ones must not pass it for ever
        return None

    def _has_room(self, sequence: Sequence) -> bool:
        """Tell whether a sequence fits beside the others into a shared store; there is always room for the first."""
        if self.cache.capacity is None or not self.running:
            return True
        known = sum(other.n_tokens + 1 for other in self.running)
        return known + sequence.n_tokens <= self.cache.capacity

    def _prefix_is_coming(self, sequence: Sequence) -> bool:
        """Tell whether a running sequence is computing a prefix that is long enough to wait for it."""
        if sequence.awaits is None:
            sequence.awaits, sequence.n_awaited = self._prefix_to_await(sequence)
        donor = sequence.awaits
        if donor is None or donor.slot is None or donor.n_computed >= sequence.n_awaited:
            sequence.awaits = None
            return False
        return True

    def _prefix_to_await(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        if not sequence.reuses_prefix:
            return None, 0
        known = sequence.tokens[: sequence.n_tokens]
        best: Sequence | None = None
        longest = 0
        for other in self.running:
            if other.n_pending > 1 and other.scope == sequence.scope and self.cache.can_rewind:
                common = min(common_prefix(other.tokens[: other.n_tokens], known), len(known) - 1)
                if common > max(longest, other.n_computed):
                    best, longest = other, common
        if best is None or longest < self.cache.longest_prefix(known, sequence.scope) + _WORTH_WAITING:
            return None, 0
        return best, longest


def _chunk(sequence: Sequence, slot: Slot, count: int, guesses: int, score_rows: int) -> Chunk:
    """Return the next `count` known tokens of a sequence, fewer if their log probabilities take too many rows."""
    start = sequence.n_computed
    scores = 0
    if sequence.score is not None:
        count, scores = sequence.score.fit(start, count, sequence.n_prompt, score_rows)
    wants_logits = start + count == sequence.n_tokens
    return Chunk(sequence, slot, start, count + guesses, wants_logits, guesses, scores)


def _share(ordered: list[Sequence], oldest: Sequence, budget: int, room: int) -> list[tuple[Sequence, int]]:
    """Split a step's tokens: a chunk for the oldest prompt, so that none starves, and the rest in the order given.

    A prompt that ends within `room` is computed to its end, over the `budget`: the rest isn't worth a pass of its own.
    """
    counts = {oldest.request: min(oldest.n_pending, LEAST_CHUNK, budget)}
    budget -= counts[oldest.request]
    room -= counts[oldest.request]
    for sequence in ordered:
        pending = sequence.n_pending - counts.get(sequence.request, 0)
        if budget < LEAST_CHUNK and sequence is not oldest:
            continue
        more = pending if pending <= room else max(budget, 0)
        counts[sequence.request] = counts.get(sequence.request, 0) + more
        budget -= more
        room -= more
    return [(sequence, counts[sequence.request]) for sequence in ordered if sequence.request in counts]


def _between(streams: list[Sequence], prompts: list[Sequence]) -> list[Sequence]:
    """Return the prompts whose slots lie between the streams': a token of each closes a gap, which costs a pass.

    None whose tokens' log probabilities are wanted: with kernels for single tokens these come out a little different.
    """
    taken = sorted(sequence.slot.index for sequence in streams if sequence.slot)
    able = [prompt for prompt in prompts if prompt.slot and prompt.score is None]
    return [prompt for prompt in able if prompt.slot and taken and taken[0] < prompt.slot.index < taken[-1]]
