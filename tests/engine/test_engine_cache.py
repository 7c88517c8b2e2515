"""Prefixes from other slots, a shared store that runs short, and quantized caches, with the real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.llama.context import Context
from app.llama.model import Model
from app.messages import Step
from tests.engine.harness import Harness

STORY = "Once upon a time there was a small village by the sea, where every morning the fishermen went out. " * 6


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[Model]:
    with Model(default_model, device="cpu") as model:
        yield model


def open_harness(model: Model, slots: int = 3, **more: Any) -> Harness:
    return Harness(model, Context(model, slots=slots, context_length=512, batch_size=64, threads=2, **more))


def computed(harness: Harness) -> int:
    return sum(message.load.prompt_tokens_computed for message in harness.sent if isinstance(message, Step))


@pytest.mark.parametrize("store", [None, 1536])
def test_a_running_slots_prefix_is_copied_and_changes_nothing(model: Model, store: int | None) -> None:
    harness = open_harness(model, shared_tokens=store)
    with harness.context:
        alone = harness.run(1, STORY + "One day", 8)
        assert alone.cached_tokens == 0
    harness = open_harness(model, shared_tokens=store)
    with harness.context:
        harness.submit(2, STORY + "In the evening", 60, ignore_eos=True)
        while not harness.pieces(2):
            harness.engine.step()
        length = len(harness.tokens(STORY)) // 4
        last = harness.run(3, STORY + "One day", 8)
        assert harness.pieces(2)[-1].finish_reason is None
        assert last.cached_tokens >= length - 1
        harness.finish(2)
    assert harness.answer(3) == "".join(piece.text for piece in harness.pieces(3))


def test_the_same_prompt_for_all_slots_is_computed_once(model: Model) -> None:
    harness = open_harness(model)
    with harness.context:
        for request in range(3):
            harness.submit(request, STORY, 4)
        harness.finish(0, 1, 2)
        length = len(harness.tokens(STORY)) // 4
        assert computed(harness) == length + 2
        assert [harness.pieces(request)[-1].cached_tokens for request in range(3)] == [0, length - 1, length - 1]
        assert len({harness.answer(request) for request in range(3)}) == 1


def test_a_store_that_runs_short_costs_time_but_no_answer(model: Model) -> None:
    with (harness := open_harness(model)).context:
        for request in range(3):
            harness.submit(request, f"Story number {request}:", 100, ignore_eos=True)
        harness.finish(0, 1, 2)
        expected = [harness.answer(request) for request in range(3)]
    with (harness := open_harness(model, shared_tokens=256)).context:
        for request in range(3):
            harness.submit(request, f"Story number {request}:", 100, ignore_eos=True)
        harness.finish(0, 1, 2)
        assert [harness.pieces(request)[-1].finish_reason for request in range(3)] == ["length"] * 3
        assert [message.load.preemptions for message in harness.sent if isinstance(message, Step)][-1] >= 1
        assert harness.answer(0) == expected[0]


@pytest.mark.parametrize("cache_type", ["q8_0", "bf16"])
def test_a_smaller_cache_answers_nearly_the_same(model: Model, cache_type: str) -> None:
    with (harness := open_harness(model, cache_type=cache_type, flash_attention="on", micro_batch_size=32)).context:
        harness.run(1, "The capital of France is", 4)
        assert "Paris" in harness.answer(1)
