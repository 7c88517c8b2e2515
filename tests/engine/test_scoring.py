"""Log probabilities of a prompt's own tokens: by chunks, beside other work, equal to the model's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from app.errors import RequestError
from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.model import Model
from app.messages import Generate, Refused, Sampling, TokenLogprob
from app.worker.scoring import PromptScore, score_rows
from tests.api.tiny_models import bytes_model
from tests.engine.harness import GREEDY, Harness

TEXT = "The quick brown fox jumps over the lazy dog. " * 5
CONTEXT = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Return a model in f32, so that only what is wrong differs; its tokens are bytes."""
    with Model(bytes_model(tmp_path_factory.mktemp("bytes")), device="cpu") as model:
        yield model


@pytest.fixture
def harness(model: Model) -> Iterator[Harness]:
    with Context(
        model,
        slots=3,
        context_length=CONTEXT,
        batch_size=64,
        threads=2,
        prompt_rows=24,
        flash_attention="off",  # whose rounding depends on the size of the chunks
    ) as context:
        yield Harness(model, context)


@pytest.fixture(scope="module")
def direct(model: Model) -> npt.NDArray[np.float64]:
    """Return the log probability of each of the text's tokens but the first, computed in one batch."""
    tokens = model.vocabulary.tokenize(TEXT)
    rows = len(tokens)
    with Context(
        model,
        slots=1,
        context_length=CONTEXT,
        batch_size=CONTEXT,
        threads=2,
        logits_rows=rows,
        flash_attention="off",
    ) as context:
        batch = Batch(CONTEXT)
        batch.add(0, 0, tokens, wants_logits=rows)
        logits = context.decode(batch).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    scores: npt.NDArray[np.float64] = logprobs[np.arange(rows - 1), tokens[1:]]
    return scores


def entries(harness: Harness, request: int) -> list[TokenLogprob]:
    return [entry for piece in harness.pieces(request) for entry in piece.prompt_logprobs or ()]


def check(harness: Harness, request: int, direct: npt.NDArray[np.float64]) -> None:
    found = entries(harness, request)
    tokens = harness.model.vocabulary.tokenize(TEXT).tolist()
    assert [entry.token for entry in found] == tokens
    assert b"".join(entry.text for entry in found).decode() == TEXT
    assert math.isnan(found[0].logprob)
    assert np.abs([entry.logprob for entry in found[1:]] - direct).max() < 1e-4


def test_alone_in_chunks(harness: Harness, direct: npt.NDArray[np.float64]) -> None:
    last = harness.run(1, TEXT, 0, prompt_logprobs=3)
    assert (last.finish_reason, last.completion_tokens, last.text) == ("length", 0, "")
    check(harness, 1, direct)
    assert all(len(entry.top) == 3 for entry in entries(harness, 1)[1:])
    assert max(len(piece.prompt_logprobs or ()) for piece in harness.pieces(1)) <= 24


def test_the_answer_is_what_it_is_without(harness: Harness, direct: npt.NDArray[np.float64]) -> None:
    harness.run(1, TEXT, 6, ignore_eos=True)
    harness.run(2, TEXT, 6, ignore_eos=True, prompt_logprobs=0, top_logprobs=0)
    assert harness.answer(1) == harness.answer(2)
    assert harness.pieces(2)[-1].cached_tokens == 0
    check(harness, 2, direct)
    logprobs = [entry for piece in harness.pieces(2) for entry in piece.logprobs or ()]
    assert len(logprobs) == 6


def test_beside_streams_and_other_prompts(harness: Harness, direct: npt.NDArray[np.float64]) -> None:
    harness.submit(1, "Once upon a time", 60, ignore_eos=True)
    harness.submit(2, TEXT, 3, prompt_logprobs=1)
    harness.submit(3, TEXT + "again", 2, prompt_logprobs=1)
    harness.submit(4, TEXT, 0, prompt_logprobs=0)
    harness.finish(1, 2, 3, 4)
    check(harness, 2, direct)
    check(harness, 4, direct)
    assert len(harness.pieces(1)) == 60


def test_a_preempted_prompt_is_scored_once(harness: Harness, direct: npt.NDArray[np.float64]) -> None:
    harness.submit(1, TEXT, 2, prompt_logprobs=0)
    scheduler: Any = harness.engine._scheduler
    while not entries(harness, 1)[40:]:
        harness.engine.step()
    (sequence,) = scheduler.running
    harness.context.memory.clear(scheduler.preempt(sequence).index)
    harness.finish(1)
    check(harness, 1, direct)


def test_a_last_token_alone(harness: Harness) -> None:
    prompt = harness.model.vocabulary.tokenize(TEXT)[: 2 * 24 + 1].astype("<i4").tobytes()
    harness.engine.submit(Generate(1, prompt, 0, GREEDY, prompt_logprobs=0))
    harness.finish(1)
    assert [len(piece.prompt_logprobs or ()) for piece in harness.pieces(1)] == [1, 24, 24, 0]


def test_prompts_of_one_token_and_without_scores_end_at_once(harness: Harness) -> None:
    assert harness.run(1, "a", 0, prompt_logprobs=2).finish_reason == "length"
    (entry,) = entries(harness, 1)
    assert math.isnan(entry.logprob)
    assert harness.run(2, TEXT, 0).finish_reason == "length"
    assert not entries(harness, 2)


def test_the_end_has_an_entry_where_it_is_wanted(harness: Harness) -> None:
    letter = int(harness.model.vocabulary.tokenize("R")[0])
    sampling = Sampling(temperature=0, logit_bias={letter: 100.0})
    harness.run(1, TEXT, 8, sampling, top_logprobs=0, end_logprobs=True, stop_tokens=[letter])
    harness.run(2, TEXT, 8, sampling, top_logprobs=0, stop_tokens=[letter])
    with_end, without = (
        [entry for piece in harness.pieces(request) for entry in piece.logprobs or ()] for request in (1, 2)
    )
    assert harness.pieces(1)[-1].finish_reason == "stop"
    assert len(with_end) == harness.pieces(1)[-1].completion_tokens == len(without) + 1


def test_no_prefix_on_demand(harness: Harness) -> None:
    harness.run(1, TEXT, 2)
    assert harness.run(2, TEXT, 2).cached_tokens > 0
    assert harness.run(3, TEXT, 2, reuse_prefix=False).cached_tokens == 0


def test_timings_with_every_piece(harness: Harness) -> None:
    harness.run(1, "Once upon a time", 5, ignore_eos=True, timings_per_token=True)
    timings = [piece.timings for piece in harness.pieces(1)]
    assert all(timings)
    assert [t.decode for t in timings if t] == sorted(t.decode for t in timings if t)
    harness.run(2, "Once upon a time", 5, ignore_eos=True)
    assert [piece.timings is not None for piece in harness.pieces(2)] == [False] * 4 + [True]


def test_a_context_without_rows_refuses(model: Model) -> None:
    with Context(model, slots=1, context_length=256, batch_size=64, threads=2) as context:
        harness = Harness(model, context)
        harness.submit(1, "a b c", 1, prompt_logprobs=0)
        (refused,) = harness.sent
        assert isinstance(refused, Refused)
        assert refused.error == RequestError.__name__


def test_rows_are_bounded() -> None:
    assert score_rows(49_152, 512) * 49_152 * 4 <= 64 * 1024 * 1024
    assert score_rows(262_144, 512) == 64
    assert score_rows(10**7, 512) == 32
    assert score_rows(32_000, 128) == 128


def test_what_fits_into_the_rows() -> None:
    score = PromptScore(0)
    assert score.fit(0, 10, 100, 64) == (10, 10)
    assert score.fit(0, 100, 100, 200) == (100, 99)
    assert score.fit(0, 100, 100, 30) == (30, 30)
    score.done = 50  # preempted: what was scored needs no rows again
    assert score.fit(0, 60, 100, 0) == (50, 0)
    assert score.fit(0, 60, 100, 10) == (60, 10)
    assert score.fit(99, 1, 100, 0) == (1, 0)
