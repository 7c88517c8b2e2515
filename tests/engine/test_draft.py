"""A draft model beside the real one: here the same file, so that it guesses right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.errors import DecodeError
from app.llama.context import Context
from app.llama.model import Model
from app.messages import Cancel, LoadModel
from app.worker.draft import DraftModel, open_draft, vocabulary_difference
from tests.engine.harness import Harness
from tests.engine.speculating import CONTEXT, MOST, ORDINARY, REPETITIVE, SLOTS, DraftOnly, accepted, compare

PROMPTS = [ORDINARY, REPETITIVE]


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
def draft(model: Model) -> Iterator[DraftModel]:
    command = LoadModel(str(model.path), slots=SLOTS, device="cpu", threads=2, draft_path=str(model.path))
    draft = open_draft(command, model, CONTEXT)
    yield draft
    draft.close()


@pytest.fixture
def harness(model: Model, context: Context, draft: DraftModel) -> Harness:
    return Harness(model, context, speculation=DraftOnly(), draft=draft)


def test_answers_are_those_without_a_draft_model(model: Model, context: Context, harness: Harness) -> None:
    plain = Harness(model, context)
    for request, prompt in enumerate(PROMPTS):
        plain.submit(request, prompt, 30 + 5 * request, ignore_eos=True)
    plain.finish(0, 1)
    context.memory.clear_all()
    for request, prompt in enumerate(PROMPTS):
        harness.submit(request, prompt, 30 + 5 * request, ignore_eos=True)
    harness.finish(0, 1)
    for request, prompt in enumerate(PROMPTS):
        assert harness.pieces(request)[-1].completion_tokens == 30 + 5 * request
        compare(model, prompt, plain.answer(request), harness.answer(request))
    assert accepted(harness) > 50


def test_it_follows_slots_that_change_hands_and_long_prompts(harness: Harness) -> None:
    harness.submit(1, "word " * 600, 40, ignore_eos=True)
    harness.submit(2, REPETITIVE, 400, ignore_eos=True)
    harness.finish(1)
    before = accepted(harness)
    harness.engine.submit(Cancel(2))
    harness.run(3, ORDINARY, 24, ignore_eos=True)
    harness.run(4, ORDINARY + " the", 24, ignore_eos=True)
    assert accepted(harness) > before + 20


def test_a_draft_that_fails_costs_its_guesses_only(
    model: Model, context: Context, harness: Harness, draft: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = draft._context.decode
    calls = 0

    def failing(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise DecodeError("the draft model has failed")
        return working(batch)

    monkeypatch.setattr(draft._context, "decode", failing)
    last = harness.run(1, ORDINARY, 30, ignore_eos=True)
    assert (last.finish_reason, last.completion_tokens) == ("length", 30)
    context.memory.clear_all()
    plain = Harness(model, context)
    plain.run(1, ORDINARY, 30, ignore_eos=True)
    compare(model, ORDINARY, plain.answer(1), harness.answer(1))


def test_other_vocabularies_are_named() -> None:
    def with_tokens(*pieces: bytes) -> Any:
        return SimpleNamespace(vocabulary=SimpleNamespace(size=len(pieces), pieces=list(pieces)))

    assert vocabulary_difference(with_tokens(b"a", b"b"), with_tokens(b"a", b"b")) == ""
    assert "3 tokens" in vocabulary_difference(with_tokens(b"a", b"b"), with_tokens(b"a", b"b", b"c"))
    assert "token 1 is b'c' there" in vocabulary_difference(with_tokens(b"a", b"b"), with_tokens(b"a", b"c"))
