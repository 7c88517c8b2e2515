"""Guessed tokens with the real model: the answers are those without guesses, only sooner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.llama.context import Context
from app.llama.model import Model
from app.messages import Cancel, Sampling, Step
from app.worker.speculation import Speculation
from tests.engine.harness import GREEDY, Harness
from tests.engine.speculating import (
    CONTEXT,
    MOST,
    NEARLY,
    ORDINARY,
    REPETITIVE,
    SLOTS,
    Eager,
    accepted,
    compare,
    generated,
)

CODE = """def total(items):
    result = 0
    for item in items:
        result = result + item.price * item.count
    return result
"""
EDIT = f"Here is the code:\n```python\n{CODE}```\nHere is the same code again, named `sum`:\n```python\n"


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[Model]:
    with Model(default_model, device="cpu") as model:
        yield model


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    rows = SLOTS * (1 + MOST)
    with Context(model, slots=SLOTS, context_length=CONTEXT, batch_size=64, threads=2, logits_rows=rows) as context:
        yield context


@pytest.fixture
def plain(model: Model, context: Context) -> Harness:
    return Harness(model, context)


@pytest.fixture
def guessing(model: Model, context: Context) -> Harness:
    """Return a harness on the same context, to be used when the plain one is done."""
    return Harness(model, context, speculation=Eager())


@pytest.mark.parametrize("prompt", [REPETITIVE, EDIT, ORDINARY])
def test_a_greedy_answer_is_that_without_guesses(model: Model, plain: Harness, guessing: Harness, prompt: str) -> None:
    last = plain.run(1, prompt, 80, ignore_eos=True)
    plain.context.memory.clear_all()
    again = guessing.run(1, prompt, 80, ignore_eos=True)
    assert (again.finish_reason, again.completion_tokens) == (last.finish_reason, last.completion_tokens)
    assert generated(guessing) == generated(plain) == 80
    compare(model, prompt, plain.answer(1), guessing.answer(1))
    if prompt != ORDINARY:
        assert accepted(guessing) > 20
    assert accepted(plain) == 0


@pytest.mark.parametrize(("prompts", "least"), [([REPETITIVE, EDIT], 20), ([REPETITIVE, ORDINARY, EDIT], 0)])
def test_streams_together_answer_as_without_guesses(
    model: Model, plain: Harness, guessing: Harness, prompts: list[str], least: int
) -> None:
    for harness in (plain, guessing):
        for request, prompt in enumerate(prompts):
            harness.submit(request, prompt, 40 + 8 * request, ignore_eos=True)
        harness.finish(*range(len(prompts)))
        harness.context.memory.clear_all()
    for request, prompt in enumerate(prompts):
        assert guessing.pieces(request)[-1].completion_tokens == 40 + 8 * request
        compare(model, prompt, plain.answer(request), guessing.answer(request))
    assert accepted(guessing) > least  # of three, guesses begin when one has ended


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 12, 13])
def test_an_answer_has_the_length_that_was_asked_for(guessing: Harness, length: int) -> None:
    last = guessing.run(1, REPETITIVE, length, ignore_eos=True)
    assert (last.finish_reason, last.completion_tokens) == ("length", length)
    assert sum(message.load.tokens_generated for message in guessing.sent if isinstance(message, Step)) == length


def test_a_stop_string_among_guesses_ends_the_text_before_it(guessing: Harness) -> None:
    last = guessing.run(1, REPETITIVE, 60, stop=["nine"])
    assert last.finish_reason == "stop"
    assert guessing.answer(1) == " three four five six seven eight "
    assert accepted(guessing) > 0
    following = guessing.run(2, REPETITIVE + guessing.answer(1) + "nine", 12)
    assert following.cached_tokens > len(guessing.tokens(REPETITIVE)) // 4


def test_a_stop_token_among_guesses_ends_the_answer(guessing: Harness, model: Model) -> None:
    nine = int(model.vocabulary.tokenize(" nine")[0])
    last = guessing.run(1, REPETITIVE, 60, stop_tokens=[nine])
    assert (last.finish_reason, last.completion_tokens) == ("stop", 7)
    assert guessing.answer(1) == " three four five six seven eight"
    guessing.engine.check_integrity()
    early = guessing.run(2, REPETITIVE, 60, stop_tokens=[nine], min_tokens=20)
    assert early.completion_tokens > 20


def test_a_stream_is_cancelled_between_guesses(guessing: Harness) -> None:
    guessing.submit(1, REPETITIVE, 200, ignore_eos=True)
    guessing.submit(2, REPETITIVE, 30, ignore_eos=True)
    while not accepted(guessing):
        guessing.engine.step()
    guessing.engine.submit(Cancel(1))
    guessing.finish(1, 2)
    assert guessing.pieces(1)[-1].finish_reason == "cancelled"
    assert guessing.pieces(2)[-1].completion_tokens == 30


def test_each_token_of_guesses_has_its_log_probability(plain: Harness, guessing: Harness) -> None:
    entries = []
    for harness in (plain, guessing):
        harness.run(1, REPETITIVE, 30, top_logprobs=2, ignore_eos=True)
        entries.append([entry for piece in harness.pieces(1) for entry in piece.logprobs or []])
        harness.context.memory.clear_all()
    assert accepted(guessing) > 5
    assert [entry.token for entry in entries[0]] == [entry.token for entry in entries[1]]
    assert b"".join(entry.text for entry in entries[1]).decode() == guessing.answer(1)
    for without, with_guesses in zip(*entries, strict=True):
        assert with_guesses.logprob == pytest.approx(without.logprob, abs=NEARLY)
        assert len(with_guesses.top) == 2


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, seed=5),
        Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=6),
        Sampling(temperature=0.8, min_p=0.05, repeat_penalty=1.02, repeat_last_n=32, presence_penalty=0.1, seed=7),
        Sampling(temperature=0, dry_multiplier=0.1, dry_allowed_length=6, frequency_penalty=0.05),
    ],
)
def test_a_seed_draws_what_it_draws_without_guesses(plain: Harness, guessing: Harness, sampling: Sampling) -> None:
    for harness in (plain, guessing):
        harness.run(1, REPETITIVE, 40, sampling, ignore_eos=True)
        harness.context.memory.clear_all()
    assert accepted(guessing) > 3
    assert guessing.answer(1) == plain.answer(1)


def test_a_grammar_is_held_to_and_nothing_is_guessed_for_it(guessing: Harness) -> None:
    held: dict[str, Any] = {"grammar": '{"grammars": [{"lark_grammar": "start: /[a-z ]{20}/"}]}'}
    guessing.submit(1, REPETITIVE, 60, GREEDY, **held)
    guessing.submit(2, REPETITIVE, 40, ignore_eos=True)
    guessing.finish(1, 2, steps=3000)
    assert len(guessing.answer(1)) == 20
    assert accepted(guessing) > 5


def test_a_preempted_stream_goes_on_guessing(model: Model) -> None:
    with Context(
        model, slots=2, context_length=256, batch_size=64, threads=2, shared_tokens=256, logits_rows=2 * (1 + MOST)
    ) as context:
        harness = Harness(model, context, speculation=Eager())
        for request in (1, 2):
            harness.submit(request, REPETITIVE, 100, ignore_eos=True)
        harness.finish(1, 2, steps=3000)
        assert [harness.pieces(request)[-1].completion_tokens for request in (1, 2)] == [100, 100]
        assert accepted(harness) > 20


def test_a_real_clock_decides_when_guesses_pay(model: Model, context: Context) -> None:
    harness = Harness(model, context, speculation=Speculation(MOST, SLOTS * MOST))
    harness.run(1, REPETITIVE, 120, ignore_eos=True)
    assert accepted(harness) > 30
