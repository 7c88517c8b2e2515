"""What `--deterministic` promises: an answer, to the last bit of its logprobs, depends on its request alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.llama.context import Context
from app.llama.model import Model
from app.messages import Sampling
from tests.engine.harness import GREEDY, Harness

PROMPT = "The lighthouse keeper wrote down the weather of every day, and the ships that passed. " * 12
SAMPLED = Sampling(temperature=0.9, top_k=0, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[Model]:
    with Model(default_model, device="cpu") as model:
        yield model


@pytest.fixture
def harness(model: Model) -> Iterator[Harness]:
    with Context(model, slots=1, context_length=1024, batch_size=128, threads=2) as context:
        yield Harness(model, context, deterministic=True)


def answer(harness: Harness, request: int) -> list[tuple[str, list[tuple[int, float]]]]:
    return [
        (piece.text, [(entry.token, entry.logprob) for entry in piece.logprobs or ()])
        for piece in harness.pieces(request)
    ]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_equal_requests_get_equal_answers_whatever_was_there_before(harness: Harness, sampling: Sampling) -> None:
    harness.run(1, PROMPT, 12, sampling, top_logprobs=3)
    harness.run(2, PROMPT + " Then", 8)  # leaves a prefix that is not to be reused
    harness.run(3, PROMPT, 12, sampling, top_logprobs=3)
    assert answer(harness, 1) == answer(harness, 3)
    assert harness.pieces(3)[-1].cached_tokens == 0


def test_equal_requests_get_equal_answers_whatever_comes_meanwhile(harness: Harness) -> None:
    harness.run(1, PROMPT, 12, SAMPLED, top_logprobs=0)
    harness.submit(2, PROMPT, 12, SAMPLED, top_logprobs=0)
    for _ in range(4):
        harness.engine.step()
    harness.submit(3, PROMPT[:200], 6, priority=-1)
    harness.submit(4, PROMPT, 12, SAMPLED, top_logprobs=0)
    harness.finish(2, 3, 4)
    assert answer(harness, 1) == answer(harness, 2) == answer(harness, 4)


def test_prompts_are_cut_by_their_length_alone(harness: Harness) -> None:
    computed = []
    decode = harness.context.decode

    def counted(batch):  # type: ignore[no-untyped-def]
        computed.append(len(batch))
        return decode(batch)

    harness.context.decode = counted  # type: ignore[method-assign]
    harness.run(1, PROMPT, 2)
    length = len(harness.tokens(PROMPT)) // 4
    assert computed == [128] * (length // 128) + [length % 128, 1]
