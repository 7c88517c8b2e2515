"""Who gets how many tokens of a step."""

from __future__ import annotations

import numpy as np
import pytest

from app.messages import Sampling
from app.worker.detokenizer import Detokenizer
from app.worker.kv import KvCache
from app.worker.sampler import TokenSampler
from app.worker.scheduler import Chunk, PromptBudget, Scheduler
from app.worker.sequence import Sequence


def sequence(request: int, prompt: int, answer: int = 8) -> Sequence:
    tokens = np.full(prompt + answer, request, np.int32)
    sampler = TokenSampler(Sampling(temperature=0), 100)
    return Sequence(request, tokens, prompt, prompt, float(request), sampler, Detokenizer())


def step(scheduler: Scheduler) -> list[Chunk]:
    """Admit, schedule, and pretend that everything was computed and drawn."""
    scheduler.admit()
    chunks = scheduler.schedule().chunks
    scheduler.advance(chunks)
    for chunk in chunks:
        if chunk.wants_logits:
            chunk.sequence.append(7)
    return chunks


def counts(chunks: list[Chunk]) -> dict[int, int]:
    return {chunk.sequence.request: chunk.count for chunk in chunks}


def quick() -> PromptBudget:
    """Return a budget that is no bound: of a device that computes a million tokens a second."""
    budget = PromptBudget()
    budget.observe(1000, 0.001)
    return budget


def test_a_lone_prompt_comes_in_chunks_within_batch_and_target_time() -> None:
    scheduler = Scheduler(KvCache(2), 100, quick())
    scheduler.add(sequence(1, 250))
    assert [counts(step(scheduler)) for _ in range(4)] == [{1: 100}, {1: 100}, {1: 50}, {1: 1}]

    budget = PromptBudget(target_seconds=0.1)
    budget.observe(100, 0.2)  # 2 ms a token
    scheduler = Scheduler(KvCache(2), 512, budget)
    scheduler.add(sequence(1, 220))
    assert [counts(step(scheduler)) for _ in range(4)] == [{1: 50}, {1: 50}, {1: 50}, {1: 70}]


def test_streams_and_prompts_take_turns() -> None:
    budget = PromptBudget(target_seconds=0.1)
    budget.observe(100, 0.2)
    scheduler = Scheduler(KvCache(3), 512, budget)
    scheduler.add(sequence(1, 1))
    scheduler.add(sequence(2, 1))
    step(scheduler)
    scheduler.add(sequence(3, 130))
    turns = [counts(step(scheduler)) for _ in range(5)]
    assert turns == [{3: 50}, {1: 1, 2: 1}, {3: 80}, {1: 1, 2: 1, 3: 1}, {1: 1, 2: 1, 3: 1}]


def test_the_budget_starts_small_and_never_falls_below_the_least_chunk() -> None:
    budget = PromptBudget()
    assert budget.tokens() == 32
    budget.observe(8, 60.0)  # too small to say anything
    assert budget.tokens() == 32
    budget.observe(100, 0.1)
    assert budget.tokens() == 200
    for _ in range(50):
        budget.observe(100, 100.0)
    assert budget.tokens() == 32


def test_short_prompts_are_done_first_and_the_oldest_never_starves() -> None:
    scheduler = Scheduler(KvCache(4), 100, quick())
    for request, prompt in ((1, 300), (2, 40), (3, 20), (4, 300)):
        scheduler.add(sequence(request, prompt))
    assert counts(step(scheduler)) == {1: 40, 2: 40, 3: 20}


def test_of_equal_prompts_the_oldest_is_done_first() -> None:
    scheduler = Scheduler(KvCache(3), 512)  # not measured yet: the least chunk
    for request in (1, 2, 3):
        scheduler.add(sequence(request, 120))
    turns = [counts(step(scheduler)) for _ in range(4)]
    assert turns == [{1: 32}, {1: 88}, {1: 1}, {2: 32}]


def test_a_rest_that_is_not_worth_a_pass_is_computed_at_once() -> None:
    budget = PromptBudget(target_seconds=0.1)
    budget.observe(100, 0.2)  # 50 tokens
    scheduler = Scheduler(KvCache(1), 512, budget)
    scheduler.add(sequence(1, 81))
    assert counts(step(scheduler)) == {1: 81}
    narrow = Scheduler(KvCache(1), 60, budget)
    narrow.add(sequence(2, 81))
    assert [counts(step(narrow)) for _ in range(2)] == [{2: 50}, {2: 31}]


def test_a_prompt_between_streams_closes_the_gap() -> None:
    scheduler = Scheduler(KvCache(3), 512, quick())
    for request in (1, 2, 3):
        scheduler.add(sequence(request, 1, answer=90))
    step(scheduler)
    scheduler.remove(scheduler.running[1])
    scheduler.add(sequence(4, 1000))
    turns = [counts(step(scheduler)) for _ in range(3)]
    assert turns == [{4: 512}, {1: 1, 3: 1, 4: 1}, {4: 487}]


def test_chunks_are_ordered_by_slot() -> None:
    scheduler = Scheduler(KvCache(3), 100, quick())
    for request in (1, 2, 3):
        scheduler.add(sequence(request, 5 * request))
    slots = [chunk.slot.index for chunk in step(scheduler)]
    assert slots == sorted(slots)


def test_waiting_sequences_get_slots_in_order() -> None:
    scheduler = Scheduler(KvCache(1), 100)
    first, second = sequence(1, 3), sequence(2, 3)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.admit() == [first]
    scheduler.remove(first)
    assert scheduler.admit() == [second]


def test_a_waiting_sequence_can_be_removed() -> None:
    scheduler = Scheduler(KvCache(1), 100)
    waiting = sequence(1, 3)
    scheduler.add(waiting)
    assert scheduler.find(1) is waiting
    scheduler.remove(waiting)
    assert scheduler.find(1) is None
    assert not scheduler.has_work


def test_a_forgotten_prefix_is_computed_again() -> None:
    scheduler = Scheduler(KvCache(1), 100)
    first = sequence(1, 10)
    scheduler.add(first)
    step(scheduler)
    scheduler.remove(first)
    again = sequence(1, 10)
    scheduler.add(again)
    scheduler.admit()
    assert again.n_cached == 9
    scheduler.forget_prefix(again)
    assert counts(step(scheduler)) == {1: 10}


def test_a_batch_smaller_than_the_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller"):
        Scheduler(KvCache(8), 4)
