"""How many guesses a step holds: as many as pay."""

from __future__ import annotations

import numpy as np
import pytest

from app.messages import Piece, Sampling, TokenLogprob
from app.worker.detokenizer import Detokenizer
from app.worker.draft_rate import DraftRate
from app.worker.grammar import SequenceGrammar
from app.worker.kv import KvCache
from app.worker.sampling.sampler import TokenSampler
from app.worker.scheduler import Scheduler
from app.worker.sequence import Sequence
from app.worker.speculation import Speculation, guesses_in_step
from app.worker.step_times import Ledger, StepTimes
from app.worker.verification import joined

CYCLE = list(range(10, 40))


def stream(request: int = 1, prompt: list[int] | None = None, answer: int = 30, room: int = 40) -> Sequence:
    """Return a sequence that has repeated so many tokens of its prompt."""
    prompt = CYCLE * 2 if prompt is None else prompt
    tokens = np.zeros(len(prompt) + answer + room, np.int32)
    tokens[: len(prompt)] = prompt
    tokens[len(prompt) : len(prompt) + answer] = np.resize(prompt[:30], answer)
    known = len(prompt) + answer
    sampler = TokenSampler(Sampling(temperature=0), 100)
    return Sequence(request, tokens, len(prompt), known, 0.0, sampler, Detokenizer(), n_computed=known - 1)


def measured(most: int = 15, streams: int = 1, seconds: float = 1.0, per_guess: float = 0.1) -> Speculation:
    """Return a speculation that has seen steps with so many streams, and has something to lose."""
    speculation = Speculation(most, 64)
    for _ in range(8):
        speculation.observe(streams, 0, seconds)
        for guesses in (1, 3, 7, 15, 31):
            speculation.times.observe(streams, guesses, seconds + per_guess * guesses)
    speculation.settle(stream(), 1, 15, 100)
    return speculation


def test_cheap_guesses_are_many_and_dear_ones_none() -> None:
    assert measured(per_guess=0.01).guess([stream()], 64, 0.1) == {1: 15}
    assert measured(per_guess=0.3).guess([stream(answer=4)], 64, 0.1)[1] <= 7
    assert measured(per_guess=1.0).guess([stream()], 64, 0.1) == {}


def test_guesses_are_written_behind_the_known_tokens() -> None:
    one = stream()
    count = measured(most=7).guess([one], 64, 0.1)[1]
    assert count == 7
    assert one.tokens[one.n_tokens : one.n_tokens + count].tolist() == CYCLE[:7]
    assert one.n_pending == 1


def test_without_a_measured_step_nothing_is_guessed_and_little_at_first() -> None:
    speculation = Speculation(7, 64)
    assert speculation.guess([stream()], 64, 0.1) == {}
    speculation.observe(1, 0, 1.0)
    assert speculation.guess([stream()], 64, 0.5) == {1: 3}
    speculation.settle(stream(), 1, 10, 10)
    assert speculation.guess([stream()], 64, 0.5) == {1: 7}


def test_room_bounds_the_guesses_of_an_answer_and_of_a_step() -> None:
    speculation = measured(per_guess=0.01)
    assert speculation.guess([stream(room=5)], 64, 0.1) == {1: 3}
    assert speculation.guess([stream(room=1)], 64, 0.1) == {}
    assert speculation.guess([stream()], 4, 0.1) == {1: 3}
    assert speculation.guess([stream()], 0, 0.1) == {}


def test_only_those_with_something_to_guess_from_do() -> None:
    speculation = measured(streams=2, per_guess=0.01)
    plain = stream(2, prompt=list(range(50, 90)), answer=0)
    plain.append(1)
    assert list(speculation.guess([stream(1), plain], 64, 0.1)) == [1]
    held = stream(3)
    held.grammar = SequenceGrammar("")
    assert list(speculation.guess([held, stream(1)], 64, 0.1)) == [1]
    assert set(speculation.guess([stream(1), stream(2)], 64, 0.1)) == {1, 2}
    assert (
        len(speculation.guess([stream(1), stream(2)], 15, 0.1)) == 1
        or speculation.guess([stream(1), stream(2)], 15, 0.1)[1] <= 7
    )


def test_more_than_two_streams_do_not_guess() -> None:
    speculation = measured(streams=3, per_guess=0.01)
    assert speculation.guess([stream(1), stream(2), stream(3)], 64, 0.1) == {}


def test_a_draft_model_guesses_where_the_text_has_nothing_and_as_long_as_it_is_right() -> None:
    speculation = Speculation(7, 64, draft_cost=0.05)
    speculation.observe(1, 0, 1.0)
    one = stream(prompt=list(range(50, 90)), answer=0)
    one.append(1)
    chosen = speculation.guess([one], 64, 0.1)
    assert speculation.source == "draft"
    assert chosen[1] >= 3
    for _ in range(30):
        speculation.settle(one, 1, 7, 0)
    assert speculation.guess([one], 64, 0.1) == {}
    speculation.source = "draft"
    for _ in range(60):
        speculation.settle(one, 1, 7, 7)
    assert speculation.guess([one], 64, 0.1) == {1: 7}


def test_a_draft_rate_counts_up_to_the_first_wrong_guess_and_recovers() -> None:
    everyone = DraftRate()
    mine = DraftRate(everyone)
    for _ in range(200):
        mine.observe(3, 1)  # one right, one wrong, and one that says nothing
    assert mine.rate == pytest.approx(0.5, abs=0.02)
    assert DraftRate(everyone).expected(2) == pytest.approx([0.5, 0.75], abs=0.03)
    for _ in range(50):
        mine.observe(3, 0)
    low = mine.rate
    for _ in range(400):
        mine.expected(1)
    assert low < 0.3 < 0.5 < mine.rate


def test_what_was_never_measured_is_tried_and_what_looked_bad_again_after_a_while() -> None:
    times = StepTimes()
    assert times.without_guesses(1) is None
    times.observe(1, 3, 9.9)  # nothing to compare it with
    times.observe(1, 0, 1.0)
    times.observe(1, 0, 1.0)
    assert times.with_guesses(1, 3, 0.25) == 1.75
    times.observe(1, 3, 4.0)
    assert times.with_guesses(1, 3) == pytest.approx(4.0)
    assert times.with_guesses(1, 15, 0.25) == 4.75
    for _ in range(600):
        times.observe(1, 0, 1.0)
    assert 2.0 < times.with_guesses(1, 3) < 3.5


def test_one_disturbed_step_does_not_spoil_an_average() -> None:
    times = StepTimes()
    for _ in range(10):
        times.observe(1, 0, 1.0)
    times.observe(1, 0, 100.0)
    assert times.without_guesses(1) == pytest.approx(1.2)


def test_a_step_that_is_slow_because_the_last_one_guessed_counts_against_guesses() -> None:
    times = StepTimes()
    times.observe(1, 0, 1.0)
    for _ in range(20):
        times.observe(1, 3, 2.0)
        times.observe(1, 0, 1.5)
    assert times.without_guesses(1) == 1.0
    assert times.with_guesses(1, 3) == pytest.approx(2.5, abs=0.05)


def test_guesses_that_never_come_true_cost_a_hundredth() -> None:
    ledger = Ledger()
    plain = spent = 0.0
    for _ in range(20_000):
        if ledger.credit >= 1.0:
            ledger.guessing_step(2.0)
            spent += 1.0
        else:
            ledger.plain_step()
            plain += 1.0
    assert spent <= 3 + 0.0101 * plain
    ledger.came_true(1000)
    assert ledger.credit < 20


def test_logits_of_all_guesses_are_bounded() -> None:
    assert guesses_in_step(1, 15) == 15
    assert guesses_in_step(64, 7) == 64
    assert guesses_in_step(4, 31) == 64


def test_a_scheduler_gives_guesses_to_streams_and_settles_them() -> None:
    scheduler = Scheduler(KvCache(2), 100, speculation=measured(most=7, per_guess=0.01))
    one = stream()
    one.n_computed = 0
    scheduler.add(one)
    scheduler.admit()
    while one.n_pending > 1:
        scheduler.advance(scheduler.schedule().chunks)
    scheduler.advance(scheduler.schedule().chunks)
    one.append(int(CYCLE[0]))
    schedule = scheduler.schedule()
    (chunk,) = schedule.chunks
    assert (chunk.count, chunk.guesses, schedule.guesses, chunk.wants_logits) == (8, 7, 7, True)
    scheduler.advance(schedule.chunks)
    assert scheduler.settle(chunk, 2) == chunk.start + 3 == one.n_computed == chunk.slot.length


def test_nobody_guesses_while_a_prompt_is_there() -> None:
    scheduler = Scheduler(KvCache(2), 100, speculation=measured(most=7, per_guess=0.01))
    one, other = stream(1), stream(2)
    one.n_computed = other.n_computed = 0
    for sequence in (one, other):
        scheduler.add(sequence)
        scheduler.admit()
        if sequence is one:
            while one.n_pending:
                scheduler.advance(scheduler.schedule().chunks)
            one.append(int(CYCLE[0]))
    steps = [scheduler.schedule(), scheduler.schedule()]  # one of the prompt, one of the stream
    assert [step.guesses for step in steps] == [0, 0]
    assert min(max(chunk.count for chunk in step.chunks) for step in steps) == 1


def test_a_shared_store_gives_up_nothing_for_guesses() -> None:
    scheduler = Scheduler(KvCache(2, capacity=95), 100, speculation=measured(most=15, per_guess=0.01))
    one = stream()
    one.n_computed = 0
    scheduler.add(one)
    scheduler.admit()
    while one.n_pending:
        scheduler.advance(scheduler.schedule().chunks)
    one.append(int(CYCLE[0]))
    assert scheduler.schedule().guesses == 3  # 90 are stored, and its own token


def test_pieces_of_a_step_are_joined() -> None:
    entries = [TokenLogprob(token, b"x", -1.0) for token in range(3)]
    pieces = [
        Piece(1, "a", 4, logprobs=entries[:1]),
        Piece(2, "x", 9),
        Piece(1, "b", 5, logprobs=entries[1:2]),
        Piece(1, "c", 6, "stop", logprobs=entries[2:]),
    ]
    assert joined(pieces) == [Piece(1, "abc", 6, "stop", logprobs=entries), Piece(2, "x", 9)]
