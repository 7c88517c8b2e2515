"""Who gets how many tokens of a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from app.messages import Sampling
from app.worker.budget import StepBudget
from app.worker.detokenizer import Detokenizer
from app.worker.kv import KvCache
from app.worker.sampling.sampler import TokenSampler
from app.worker.scheduler import Chunk, Scheduler
from app.worker.sequence import Sequence


def sequence(request: int, prompt: int, answer: int = 8, content: int | None = None, **more: Any) -> Sequence:
    tokens = np.full(prompt + answer, request if content is None else content, np.int32)
    sampler = TokenSampler(Sampling(temperature=0), 100)
    return Sequence(request, tokens, prompt, prompt, float(request), sampler, Detokenizer(), **more)


def step(scheduler: Scheduler) -> list[Chunk]:
    """Admit, schedule, and pretend that everything was computed and drawn."""
    scheduler.admit()
    chunks = scheduler.schedule().chunks
    scheduler.advance(chunks)
    for chunk in chunks:
        if chunk.wants_logits:
            chunk.sequence.append(7)
    return chunks


def admitted(scheduler: Scheduler) -> list[Sequence]:
    return [sequence for sequence, _ in scheduler.admit()]


def counts(chunks: list[Chunk]) -> dict[int, int]:
    return {chunk.sequence.request: chunk.count for chunk in chunks}


def quick() -> StepBudget:
    """Return a budget that is no bound: of a device that computes a million tokens a second."""
    budget = StepBudget()
    budget.observe_prompts(1000, 0.001)
    return budget


def test_a_lone_prompt_comes_in_chunks_within_batch_and_target_time() -> None:
    scheduler = Scheduler(KvCache(2), 100, quick())
    scheduler.add(sequence(1, 250))
    assert [counts(step(scheduler)) for _ in range(4)] == [{1: 100}, {1: 100}, {1: 50}, {1: 1}]

    budget = StepBudget(itl_target=0.1)
    budget.observe_prompts(100, 0.2)  # 2 ms a token: 125 in a quarter of a second, which no stream waits for
    scheduler = Scheduler(KvCache(2), 512, budget)
    scheduler.add(sequence(1, 280))
    assert [counts(step(scheduler)) for _ in range(4)] == [{1: 64}, {1: 64}, {1: 64}, {1: 88}]


def test_streams_and_prompts_take_turns() -> None:
    budget = StepBudget(itl_target=0.1)
    budget.observe_prompts(100, 0.2)
    scheduler = Scheduler(KvCache(3), 512, budget)
    scheduler.add(sequence(1, 1))
    scheduler.add(sequence(2, 1))
    step(scheduler)
    scheduler.add(sequence(3, 110))
    turns = [counts(step(scheduler)) for _ in range(5)]
    assert turns == [{3: 50}, {1: 1, 2: 1}, {3: 60}, {1: 1, 2: 1, 3: 1}, {1: 1, 2: 1, 3: 1}]


def test_the_budget_starts_small_and_never_falls_below_the_least_chunk() -> None:
    budget = StepBudget(itl_target=0.25)
    assert budget.prompt_bounds() == (32, 40)
    budget.observe_prompts(8, 60.0)  # too small to say anything
    assert budget.prompt_bounds() == (32, 40)
    budget.observe_streams(0.01)  # a prompt's token is guessed to take a quarter of that
    assert budget.prompt_bounds() == (64, 121)
    budget.observe_prompts(100, 0.1)
    assert budget.prompt_bounds() == (192, 256)
    for _ in range(50):
        budget.observe_prompts(100, 100.0)
    assert budget.prompt_bounds() == (32, 32)


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
    assert turns == [{1: 64}, {1: 56}, {1: 1}, {2: 64}]


def test_a_rest_that_is_not_worth_a_pass_is_computed_at_once() -> None:
    budget = StepBudget(itl_target=0.1)
    budget.observe_prompts(100, 0.2)  # 64 tokens
    scheduler = Scheduler(KvCache(1), 512, budget)
    scheduler.add(sequence(1, 128))
    assert counts(step(scheduler)) == {1: 128}
    narrow = Scheduler(KvCache(1), 70, budget)
    narrow.add(sequence(2, 95))
    assert [counts(step(narrow)) for _ in range(2)] == [{2: 64}, {2: 31}]


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
    assert admitted(scheduler) == [first]
    scheduler.remove(first)
    assert admitted(scheduler) == [second]


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
    assert again.n_computed == 9
    scheduler.set_prefix(again, 0)
    assert counts(step(scheduler)) == {1: 10}


def test_a_batch_smaller_than_the_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller"):
        Scheduler(KvCache(8), 4)


def test_a_prefix_that_is_being_computed_is_waited_for_and_copied() -> None:
    scheduler = Scheduler(KvCache(3), 100, quick())
    first, second, other = sequence(1, 250), sequence(2, 260, content=1), sequence(3, 20)
    for added in (first, second, other):
        scheduler.add(added)
    assert counts(step(scheduler)) == {1: 80, 3: 20}
    assert second in scheduler.waiting
    while not (now := scheduler.admit()):
        step(scheduler)
    ((follower, placement),) = now
    assert (follower, placement.cached, placement.donor) == (second, 250, first.slot)


def test_who_waits_for_a_prefix_goes_on_without_it_when_it_will_not_come() -> None:
    scheduler = Scheduler(KvCache(2), 100, quick())
    first, second = sequence(1, 250), sequence(2, 250, content=1)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    scheduler.remove(first)
    ((admitted_now, placement),) = scheduler.admit()
    assert (admitted_now, placement.cached) == (second, 100)


def test_a_scope_never_sees_the_prefix_of_another() -> None:
    scheduler = Scheduler(KvCache(2), 512, quick())
    scheduler.add(sequence(1, 200, scope="a"))
    step(scheduler)
    scheduler.add(sequence(2, 200, content=1, scope="b"))
    scheduler.add(sequence(3, 200, content=1, scope="a"))
    ((stranger, placement),) = scheduler.admit()
    assert (stranger.request, placement.cached, placement.donor) == (2, 0, None)
    scheduler.remove(scheduler.running[0])
    ((friend, placement),) = scheduler.admit()
    assert (friend.request, placement.cached) == (3, 199)


def test_the_client_that_was_served_least_is_next() -> None:
    scheduler = Scheduler(KvCache(1), 8192, quick())
    for request in range(3):
        scheduler.add(sequence(request, 8000, client="greedy"))
    step(scheduler)
    scheduler.add(sequence(9, 10, client="modest"))
    scheduler.remove(scheduler.running[0])
    assert [waiting.request for waiting in admitted(scheduler)] == [9]


def test_equals_are_served_in_the_order_of_their_coming() -> None:
    scheduler = Scheduler(KvCache(1), 512, quick())
    for request, client in ((1, "a"), (2, "a"), (3, "b")):
        scheduler.add(sequence(request, 100, client=client))
    order = []
    while scheduler.waiting:
        order += [one.request for one in admitted(scheduler)]
        step(scheduler)
        scheduler.remove(scheduler.running[0])
    assert order == [1, 2, 3]


def test_the_urgent_come_first() -> None:
    scheduler = Scheduler(KvCache(1), 512)
    for request, priority in ((1, 0), (2, 5), (3, -5)):
        scheduler.add(sequence(request, 10, priority=priority))
    assert [one.request for one in admitted(scheduler)] == [3]
    scheduler.remove(scheduler.running[0])
    assert [one.request for one in admitted(scheduler)] == [1]


def test_the_preempted_is_computed_again_and_keeps_what_it_has_drawn() -> None:
    scheduler = Scheduler(KvCache(2, capacity=60), 512, quick())
    scheduler.add(sequence(1, 20))
    scheduler.add(sequence(2, 20))
    step(scheduler)
    step(scheduler)
    victim = scheduler.youngest()
    assert (victim.request, victim.n_tokens) == (2, 22)
    slot = scheduler.preempt(victim)
    assert (slot.length, slot.busy, scheduler.preemptions) == (0, False, 1)
    assert counts(step(scheduler)) == {2: 22}
    assert (victim.n_tokens, victim.n_drawn) == (23, 3)


def test_without_room_in_a_shared_store_the_next_in_turn_waits() -> None:
    scheduler = Scheduler(KvCache(3, capacity=100), 512, quick())
    for request, prompt in ((1, 60), (2, 50), (3, 5)):
        scheduler.add(sequence(request, prompt))
    assert [one.request for one in admitted(scheduler)] == [1]
    scheduler.remove(scheduler.running[0])
    assert [one.request for one in admitted(scheduler)] == [2, 3]


def test_an_itl_target_bounds_what_prompts_take_from_streams() -> None:
    budget = StepBudget(itl_target=0.1)
    budget.observe_streams(0.03)
    budget.observe_prompts(100, 0.1)
    assert budget.prompt_bounds() == (64, 95)
    assert budget.prompt_bounds(undisturbed=True) == (192, 256)
    automatic = StepBudget()
    automatic.observe_streams(0.01)
    assert automatic.itl_target == pytest.approx(0.08)
    automatic.observe_streams(0.5)
    assert automatic.itl_target == 0.25


def test_prompts_do_not_hold_up_a_stream_that_waits_for_its_mask() -> None:
    budget = StepBudget(itl_target=0.1)
    budget.observe_prompts(100, 0.2)  # 50 tokens in the target time
    scheduler = Scheduler(KvCache(2), 512, budget)
    stream = sequence(1, 1)
    scheduler.add(stream)
    scheduler.admit()
    scheduler.advance(scheduler.schedule().chunks)  # its logits are there, and no token is drawn yet
    scheduler.add(sequence(2, 200))
    assert counts(step(scheduler)) == {2: 50}
