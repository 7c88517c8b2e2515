"""Grammars that begin in the middle of an answer, and control tokens that its text shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.llama.context import Context
from app.llama.model import Model
from app.messages import CompileGrammar, Sampling, Trigger
from app.text.grammar_check import GrammarChecker
from tests.engine.harness import GREEDY, Harness

PROMPT = "The capital of France is"
NEVER = 49000  # a token that the free answer does not have


@pytest.fixture(scope="module")
def harness(default_model: Path) -> Iterator[Harness]:
    with (
        Model(default_model, device="cpu") as model,
        Context(model, slots=2, context_length=256, batch_size=64, threads=1) as context,
    ):
        yield Harness(model, context)


@pytest.fixture(scope="module")
def grammar(harness: Harness) -> str:
    source = json.dumps(["zebra crossing"])
    return GrammarChecker(harness.model.vocabulary).compiled(CompileGrammar(1, "choice", source, "x"))[0]


@pytest.fixture(scope="module")
def free(harness: Harness) -> list[int]:
    """Return the tokens of the answer without a grammar; they are drawn again as long as no grammar begins."""
    harness.run(90, PROMPT, 12, GREEDY, top_logprobs=0)
    return [entry.token for piece in harness.pieces(90) for entry in piece.logprobs or []]


def text(harness: Harness, tokens: list[int]) -> str:
    return b"".join(harness.model.vocabulary.pieces[token] for token in tokens).decode()


def test_it_begins_behind_its_token(harness: Harness, grammar: str, free: list[int]) -> None:
    place = next(index for index in range(2, len(free)) if free[index] not in free[:index])
    harness.submit(1, PROMPT, 24, GREEDY, grammar=grammar, trigger=Trigger(free[place]))
    harness.submit(2, PROMPT, 12, GREEDY)  # beside it, free
    harness.finish(1, 2, steps=2000)
    assert harness.answer(1) == text(harness, free[: place + 1]) + "zebra crossing"
    assert harness.pieces(1)[-1].finish_reason == "stop"
    assert harness.answer(2) == text(harness, free)


@pytest.mark.parametrize("trigger", [Trigger(NEVER), None])
def test_without_its_token_it_never_begins(
    harness: Harness, grammar: str, free: list[int], trigger: Trigger | None
) -> None:
    trigger = trigger or Trigger(free[2], (NEVER, NEVER), begins_in_reasoning=True)
    harness.run(3, PROMPT, 12, GREEDY, grammar=grammar, trigger=trigger)
    assert harness.answer(3) == text(harness, free)


def test_it_begins_after_reasoning_only(harness: Harness, grammar: str, free: list[int]) -> None:
    places = [index for index in range(1, len(free)) if free[index] not in free[:index]]
    end, place = places[0], places[1]
    trigger = Trigger(free[place], (NEVER, free[end]), begins_in_reasoning=True)
    harness.submit(4, PROMPT, 24, GREEDY, grammar=grammar, trigger=trigger)
    harness.finish(4, steps=2000)
    assert harness.answer(4) == text(harness, free[: place + 1]) + "zebra crossing"


def test_control_tokens_are_shown_when_asked_for(harness: Harness) -> None:
    start = "<|im_start|>"
    (token,) = harness.model.vocabulary.tokenize(start, parse_special=True).tolist()
    always = Sampling(temperature=0, logit_bias={token: 100.0})
    harness.run(5, PROMPT, 2, always)
    harness.run(6, PROMPT, 2, always, shown=("[TOOL_CALLS]", start))
    assert (harness.answer(5), harness.answer(6)) == ("", 2 * start)
