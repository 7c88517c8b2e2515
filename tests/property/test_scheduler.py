"""What must hold after any history of requests, steps and cancellations."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.messages import Sampling
from app.worker.detokenizer import Detokenizer
from app.worker.kv import KvCache
from app.worker.sampler import TokenSampler
from app.worker.scheduler import Scheduler
from app.worker.sequence import Sequence

SLOTS, BATCH = 3, 40
SAMPLER = TokenSampler(Sampling(temperature=0), 100)

requests = st.tuples(st.just("add"), st.integers(1, 90), st.integers(1, 6), st.integers(0, 3))
events = st.lists(
    st.one_of(
        requests,
        st.tuples(st.just("step"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0), st.just(0)),
        st.tuples(st.just("slow"), st.integers(1, 1000), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def check_step(scheduler: Scheduler, memory: list[list[int]], left_out: list[int]) -> None:
    """Run one step against a model of llama.cpp's memory, as strict as the real one.

    `left_out` holds the number of steps in a row in which running streams got nothing.
    """
    waiting_before = list(scheduler.waiting)
    admitted = scheduler.admit()
    assert admitted == waiting_before[: len(admitted)]
    for sequence in admitted:
        assert sequence.slot is not None
        del memory[sequence.slot.index][sequence.n_cached :]
        assert 0 <= sequence.n_cached < sequence.n_prompt
        assert memory[sequence.slot.index] == sequence.tokens[: sequence.n_cached].tolist()
    chunks = scheduler.schedule().chunks
    assert sum(chunk.count for chunk in chunks) <= BATCH
    assert all(chunk.count >= 1 for chunk in chunks)
    assert bool(chunks) == bool(scheduler.running)
    streams = [sequence for sequence in scheduler.running if sequence.n_pending == 1]
    served = [sequence for sequence in streams if any(chunk.sequence is sequence for chunk in chunks)]
    assert served in (streams, []), "some running streams were left out"
    left_out[0] = left_out[0] + 1 if len(served) < len(streams) else 0
    assert left_out[0] <= 1, "running streams were left out twice"
    assert len({chunk.slot.index for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        assert len(memory[chunk.slot.index]) == chunk.start
        memory[chunk.slot.index] += chunk.sequence.tokens[chunk.start : chunk.start + chunk.count].tolist()
    scheduler.advance(chunks)
    for chunk in chunks:
        assert chunk.wants_logits == (chunk.sequence.n_pending == 0)
        if chunk.wants_logits:
            chunk.sequence.append(50 + chunk.start % 3)
            if chunk.sequence.is_full:
                scheduler.remove(chunk.sequence)


@settings(max_examples=200, deadline=None)
@given(events)
def test_books_and_memory_agree_and_everyone_is_served(history: list[tuple[str, int, int, int]]) -> None:
    cache = KvCache(SLOTS)
    scheduler = Scheduler(cache, BATCH)
    memory: list[list[int]] = [[] for _ in range(SLOTS)]
    added, left_out = 0, [0]
    for event, number, answer, seed in history:
        if event == "add":
            tokens = np.full(number + answer, seed, np.int32)
            scheduler.add(Sequence(added, tokens, number, number, float(added), SAMPLER, Detokenizer()))
            added += 1
        elif event == "cancel":
            if sequence := scheduler.find(number):
                scheduler.remove(sequence)
        elif event == "slow":
            scheduler.budget.observe(100, number / 100)
        else:
            check_step(scheduler, memory, left_out)
        assert cache.differences([len(held) for held in memory]) == [] or any(slot.busy for slot in cache.slots)
        assert sum(slot.busy for slot in cache.slots) == len(scheduler.running)
    steps = 0
    while scheduler.has_work:
        check_step(scheduler, memory, left_out)
        steps += 1
        assert steps < 2000, "someone starves"
    assert cache.differences([len(held) for held in memory]) == []
