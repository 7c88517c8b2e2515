"""What must hold after any history of requests, steps, cancellations and shortages.

`PESTLE_SCHEDULES` says how many random histories to try (`make prove-scheduler` tries 100,000).
"""

from __future__ import annotations

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.messages import Sampling
from app.worker.detokenizer import Detokenizer
from app.worker.kv import KvCache
from app.worker.sampling.sampler import TokenSampler
from app.worker.scheduler import Chunk, Scheduler
from app.worker.sequence import Sequence
from app.worker.speculation import Speculation

SLOTS, BATCH, SHARED = 3, 40, 120
SCHEDULES = int(os.environ.get("PESTLE_SCHEDULES", "300"))
MOST_GUESSES, MOST_GUESSES_IN_STEP = 7, 12
SAMPLER = TokenSampler(Sampling(temperature=0), 100)

Event = tuple[str, int, int, int, int]
requests = st.tuples(st.just("add"), st.integers(1, 90), st.integers(1, 30), st.integers(0, 3), st.integers(0, 5))
events = st.lists(
    st.one_of(
        requests,
        st.tuples(st.just("step"), *[st.just(0)] * 4),
        st.tuples(st.just("cancel"), st.integers(0, 20), *[st.just(0)] * 3),
        st.tuples(st.just("slow"), st.integers(1, 1000), *[st.just(0)] * 3),
    ),
    max_size=60,
)


class World:
    """A scheduler beside a model of llama.cpp's memory that is as strict as the real one."""

    def __init__(self, *, shared: bool, source: str | None = None) -> None:
        self.cache = KvCache(SLOTS, capacity=SHARED if shared else None)
        speculation = None
        if source is not None:
            cost = 0.1 if source == "draft" else None
            speculation = Speculation(MOST_GUESSES, MOST_GUESSES_IN_STEP, draft_cost=cost)
            for streams in range(1, SLOTS + 1):
                speculation.observe(streams, 0, 1.0)
        self.scheduler = Scheduler(self.cache, BATCH, speculation=speculation)
        self.memory: list[list[int]] = [[] for _ in range(SLOTS)]
        self.added = 0
        self.left_out = 0  # steps in a row in which running streams got nothing

    def add(self, prompt: int, answer: int, content: int, who: int) -> None:
        tokens = np.full(prompt + answer, content, np.int32)
        sequence = Sequence(self.added, tokens, prompt, prompt, float(self.added), SAMPLER, Detokenizer())
        sequence.client, sequence.scope, sequence.priority = f"client {who}", f"scope {who % 2}", who // 2
        self.scheduler.add(sequence)
        self.added += 1

    def step(self) -> None:
        self._admit()
        scheduler = self.scheduler
        schedule = scheduler.schedule()
        chunks = schedule.chunks
        assert schedule.guesses == sum(chunk.guesses for chunk in chunks) <= MOST_GUESSES_IN_STEP
        assert len({chunk.guesses for chunk in chunks if chunk.guesses}) <= 1
        assert sum(chunk.count for chunk in chunks) <= BATCH
        assert all(chunk.count >= 1 for chunk in chunks)
        assert bool(chunks) == bool(scheduler.running)
        streams = [sequence for sequence in scheduler.running if sequence.n_pending == 1]
        served = [sequence for sequence in streams if any(chunk.sequence is sequence for chunk in chunks)]
        assert served in (streams, []), "some running streams were left out"
        self.left_out = self.left_out + 1 if len(served) < len(streams) else 0
        assert self.left_out <= 1, "running streams were left out twice"
        assert len({chunk.slot.index for chunk in chunks}) == len(chunks)
        if self.cache.capacity and self._stored() + sum(chunk.count for chunk in chunks) > self.cache.capacity:
            assert not schedule.guesses, "guesses have made the store run short"
            self._make_room()
            return
        for chunk in chunks:
            assert len(self.memory[chunk.slot.index]) == chunk.start
            if schedule.drafted:
                known = chunk.sequence.n_tokens
                chunk.sequence.tokens[known : known + chunk.guesses] = 50
            added = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
            self.memory[chunk.slot.index] += added.tolist()
        scheduler.observe(chunks, 1.0 + 0.01 * schedule.guesses)
        scheduler.advance(chunks)
        for chunk in chunks:
            drawn = self._drawn(chunk) if chunk.wants_logits else []
            if chunk.guesses:
                del self.memory[chunk.slot.index][scheduler.settle(chunk, len(drawn) - 1) :]
            assert chunk.wants_logits == (chunk.sequence.n_pending == 0 or len(drawn) > 1)
            for token in drawn:
                chunk.sequence.append(token)
            if chunk.sequence.is_full:
                scheduler.remove(chunk.sequence)

    def _drawn(self, chunk: Chunk) -> list[int]:
        """Return the tokens that come out of a chunk: after each guess that came true, one more."""
        sequence = chunk.sequence
        drawn: list[int] = []
        while not drawn or (
            len(drawn) <= chunk.guesses and drawn[-1] == sequence.tokens[sequence.n_tokens + len(drawn) - 1]
        ):
            drawn.append(50 + (sequence.n_tokens + len(drawn)) // 3 % 2)
        return drawn

    def check(self) -> None:
        assert self.cache.differences([len(held) for held in self.memory]) == []
        assert sum(slot.busy for slot in self.cache.slots) == len(self.scheduler.running)
        for slot in self.cache.slots:
            assert self.memory[slot.index] == slot.tokens[: slot.length].tolist()

    def _admit(self) -> None:
        idle = sum(not slot.busy for slot in self.cache.slots)
        waiting = list(self.scheduler.waiting)
        admitted = self.scheduler.admit()
        for sequence, placement in admitted:
            index = placement.slot.index
            if placement.donor is not None:
                assert placement.donor is not placement.slot
                self.memory[index] = list(self.memory[placement.donor.index])
            del self.memory[index][placement.cached :]
            assert 0 <= placement.cached < sequence.n_tokens
            assert self.memory[index] == sequence.tokens[: placement.cached].tolist()
        if waiting and idle and not self.scheduler.running:
            raise AssertionError("nobody runs although somebody waits")

    def _stored(self) -> int:
        return sum(map(len, self.memory))

    def _make_room(self) -> None:
        idle = [slot for slot in self.cache.slots if not slot.busy and slot.length]
        for slot in idle:
            self.memory[slot.index].clear()
            self.cache.clear(slot)
        if not idle:
            assert len(self.scheduler.running) > 1, "one sequence alone does not fit"
            slot = self.scheduler.preempt(self.scheduler.youngest())
            self.memory[slot.index].clear()


@settings(max_examples=SCHEDULES, deadline=None)
@given(events, st.booleans(), st.sampled_from([None, "lookup", "draft"]))
def test_books_and_memory_agree_and_everyone_is_served(history: list[Event], shared: bool, source: str | None) -> None:
    world = World(shared=shared, source=source)
    for event, number, answer, content, who in history:
        if event == "add":
            world.add(number, answer, content, who)
        elif event == "cancel":
            if sequence := world.scheduler.find(number):
                world.scheduler.remove(sequence)
        elif event == "slow":
            world.scheduler.budget.observe_prompts(100, number / 100)
        else:
            world.step()
        world.check()
    steps = 0
    while world.scheduler.has_work:
        world.step()
        world.check()
        steps += 1
        assert steps < 5000, "someone starves"
