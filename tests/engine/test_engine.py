"""The engine with the real model: what comes out, and that its books are right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from app.errors import DecodeError, EngineError, NoKvSlotError
from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.model import Model
from app.messages import Accepted, Cancel, Generate, Refused, Sampling, Step
from tests.engine.harness import GREEDY, Harness

SLOTS, CONTEXT = 3, 512


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[Model]:
    with Model(default_model, device="cpu") as model:
        yield model


@pytest.fixture
def harness(model: Model) -> Iterator[Harness]:
    with Context(model, slots=SLOTS, context_length=CONTEXT, batch_size=64, threads=2) as context:
        yield Harness(model, context)


def reference(model: Model, text: str, count: int) -> str:
    """Return the greedy continuation by plain decoding, one token after the other."""
    prompt = model.vocabulary.tokenize(text)
    pieces = []
    with Context(model, slots=1, context_length=CONTEXT, batch_size=64, threads=2) as context:
        batch = Batch(64)
        batch.add(0, 0, prompt, wants_logits=True)
        for position in range(len(prompt), len(prompt) + count):
            token = int(context.decode(batch)[0].argmax())
            pieces.append(model.vocabulary.pieces[token])
            batch.clear()
            batch.add(0, position, np.array([token], np.int32), wants_logits=True)
    return b"".join(pieces).decode()


def test_greedy_equals_plain_decoding(harness: Harness, model: Model) -> None:
    last = harness.run(1, "The capital of France is", 16)
    assert harness.answer(1) == reference(model, "The capital of France is", 16)
    assert (last.finish_reason, last.completion_tokens, last.cached_tokens) == ("length", 16, 0)
    assert last.timings is not None
    assert last.timings.decode > 0 < last.timings.prefill


def test_more_requests_than_slots_all_end(harness: Harness) -> None:
    texts = [f"Count: {n}, {n + 1}, {n + 2}, {n + 3}," for n in range(7)]
    for request, text in enumerate(texts):
        harness.submit(request, text, 6 + request)
    assert [type(message) for message in harness.sent] == [Accepted] * 7
    harness.finish(*range(7))
    for request in range(7):
        assert harness.pieces(request)[-1].completion_tokens == 6 + request
    assert harness.answer(4).startswith(" 8, 9")


def test_a_prefix_is_reused_and_changes_nothing(harness: Harness) -> None:
    text = "Once upon a time there was a small village by the sea, and in this village"
    first = harness.run(1, text, 12)
    again = harness.run(2, text, 12)
    longer = harness.run(3, text + harness.answer(1) + " And then", 4)
    prompt_length = len(harness.tokens(text)) // 4
    assert first.cached_tokens == 0
    assert again.cached_tokens == prompt_length - 1
    assert longer.cached_tokens >= prompt_length
    assert harness.answer(1) == harness.answer(2)


def test_a_long_prompt_does_not_freeze_a_stream(harness: Harness) -> None:
    harness.submit(1, "Hello", 60, ignore_eos=True)
    harness.engine.step()
    harness.submit(2, "word " * 150, 2)
    while not harness.pieces(2):
        before = len(harness.pieces(1))
        harness.engine.step()
        harness.engine.step()  # streams and prompts take turns
        assert len(harness.pieces(1)) == before + 1
    assert len(harness.pieces(1)) > 3
    harness.engine.submit(Cancel(1))
    harness.finish(1, 2)


def test_a_stop_string_ends_the_text_before_it(harness: Harness) -> None:
    last = harness.run(1, "The capital of France is", 40, stop=["United"])
    assert last.finish_reason == "stop"
    assert "Paris" in harness.answer(1)
    assert "Unit" not in harness.answer(1)


def test_the_end_of_generation_stops_unless_ignored(harness: Harness) -> None:
    ends = Sampling(temperature=0, logit_bias={harness.model.vocabulary.eos or 0: 1000.0})
    stopped = harness.run(1, "Hello", 5, ends)
    ignored = harness.run(2, "Hello", 5, ends, ignore_eos=True)
    assert (stopped.finish_reason, stopped.completion_tokens, harness.answer(1)) == ("stop", 1, "")
    assert (ignored.finish_reason, ignored.completion_tokens) == ("length", 5)
    assert harness.answer(2)


def test_cancel_waiting_running_and_unknown(harness: Harness) -> None:
    for request in range(SLOTS + 1):
        harness.submit(request, f"Story {request}:", 200, ignore_eos=True)
    harness.engine.step()
    harness.engine.submit(Cancel(SLOTS))  # waits for a slot
    harness.engine.submit(Cancel(0))
    harness.engine.submit(Cancel(999))
    harness.engine.step()
    for request in (0, SLOTS):
        assert harness.pieces(request)[-1].finish_reason == "cancelled"
    for request in (1, 2):
        harness.engine.submit(Cancel(request))
    harness.engine.step()
    harness.engine.check_integrity()
    assert [message for message in harness.sent if isinstance(message, Step)][-1].load.running == 0


def test_cancel_between_the_chunks_of_a_prompt(harness: Harness) -> None:
    harness.submit(1, "word " * 200, 4)
    harness.engine.step()
    assert harness.pieces(1) == []
    harness.engine.submit(Cancel(1))
    harness.engine.step()
    assert harness.pieces(1)[-1].finish_reason == "cancelled"
    harness.engine.check_integrity()


def test_a_seed_repeats_and_a_batch_does_not_disturb_it(harness: Harness) -> None:
    seeded = Sampling(temperature=0.9, top_k=20, seed=11)
    harness.run(1, "My favourite animal is", 6, seeded)
    harness.submit(2, "My favourite animal is", 6, seeded)
    harness.submit(3, "Something else entirely", 6, Sampling(seed=5))
    harness.finish(2, 3)
    assert harness.answer(1) == harness.answer(2)


def test_every_filter_and_a_seed_repeat(harness: Harness) -> None:
    sampling = Sampling(
        temperature=0.9,
        typical_p=0.95,
        xtc_probability=0.5,
        xtc_threshold=0.05,
        dry_multiplier=0.8,
        repeat_penalty=1.1,
        repeat_last_n=-1,
        seed=3,
    )
    for request in (1, 2):
        harness.submit(request, "One, two, three. One, two, three. One,", 12, sampling, ignore_eos=True)
    harness.finish(1, 2)
    assert harness.answer(1) == harness.answer(2) != ""


def test_dry_ends_a_repetition_that_greedy_goes_on_with(harness: Harness) -> None:
    text = "red, green, blue, " * 8 + "red, green,"
    harness.run(1, text, 8)
    harness.run(2, text, 8, Sampling(temperature=0, dry_multiplier=5.0))
    assert harness.answer(1).startswith(" blue, red, green")
    assert not harness.answer(2).startswith(" blue, red")


def test_stop_tokens_end_an_answer_but_not_before_its_least_length(harness: Harness) -> None:
    text = "The capital of France is"
    harness.run(1, text, 12)
    fifth = int(harness.model.vocabulary.tokenize(harness.answer(1))[4])
    last = harness.run(2, text, 12, stop_tokens=[fifth])
    assert (last.finish_reason, last.completion_tokens) == ("stop", 5)
    assert harness.answer(1).startswith(harness.answer(2))
    assert harness.run(3, text, 12, stop_tokens=[fifth], min_tokens=9).completion_tokens > 9
    end = harness.model.vocabulary.eos or 0
    likely = Sampling(temperature=0, logit_bias={end: 1000.0})
    assert harness.run(4, text, 12, likely, min_tokens=6).completion_tokens == 7


def test_logprobs_come_with_each_token(harness: Harness) -> None:
    harness.run(1, "The capital of France is", 4, Sampling(temperature=0, logit_bias={260: -50.0}), top_logprobs=3)
    entries = [entry for piece in harness.pieces(1) for entry in piece.logprobs or []]
    assert len(entries) == 4
    for entry in entries:
        assert len(entry.top) == 3
        assert entry.top[0][2] >= entry.logprob
        assert entry.logprob < 0
    assert b"".join(entry.text for entry in entries).decode() == harness.answer(1)
    harness.run(2, "The capital of France is", 2, top_logprobs=0)
    assert harness.pieces(2)[0].logprobs is not None
    assert harness.pieces(2)[0].logprobs[0].top == []


def test_logprobs_name_control_tokens_that_have_no_text(harness: Harness) -> None:
    im_start = 1
    harness.run(1, "The capital of France is", 1, Sampling(temperature=0, logit_bias={im_start: 100.0}), top_logprobs=0)
    (entry,) = [entry for piece in harness.pieces(1) for entry in piece.logprobs or []]
    assert (entry.token, entry.text) == (im_start, b"<|im_start|>")
    assert harness.answer(1) == ""


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"prompt": b""}, "RequestError", "prompt"),
        ({"prompt": b"abc"}, "RequestError", "prompt"),
        ({"prompt": np.array([49_152], "<i4").tobytes()}, "RequestError", "prompt"),
        ({"prompt": np.array([-1], "<i4").tobytes()}, "RequestError", "prompt"),
        ({"max_tokens": -1}, "RequestError", "max_tokens"),
        ({"max_tokens": CONTEXT}, "ContextLengthError", None),
        ({"sampling": Sampling(temperature=float("nan"))}, "RequestError", "temperature"),
        ({"sampling": Sampling(min_p=2.0)}, "RequestError", "min_p"),
        ({"sampling": Sampling(repeat_penalty=0.0)}, "RequestError", "repeat_penalty"),
        ({"sampling": Sampling(typical_p=float("nan"))}, "RequestError", "typical_p"),
        ({"sampling": Sampling(xtc_probability=1.5)}, "RequestError", "xtc_probability"),
        ({"sampling": Sampling(dry_base=0.5)}, "RequestError", "dry_base"),
        ({"sampling": Sampling(dry_sequence_breakers=("x",) * 9)}, "RequestError", "dry_sequence_breakers"),
        ({"sampling": Sampling(dry_sequence_breakers=("",))}, "RequestError", "dry_sequence_breakers"),
        ({"min_tokens": 5}, "RequestError", "min_tokens"),
        ({"stop_tokens": [49_152]}, "RequestError", "stop_token_ids"),
        ({"sampling": Sampling(logit_bias={49_152: 1.0})}, "RequestError", "logit_bias"),
        ({"sampling": Sampling(logit_bias={1: float("inf")})}, "RequestError", "logit_bias"),
    ],
)
def test_what_the_engine_cannot_bear_is_refused(
    harness: Harness, change: dict[str, Any], error: str, param: str | None
) -> None:
    command = Generate(1, np.array([5], "<i4").tobytes(), 4, GREEDY)
    harness.engine.submit(msgspec.structs.replace(command, **change))
    [refused] = harness.sent
    assert isinstance(refused, Refused)
    assert (refused.error, refused.param) == (error, param)


def test_a_bias_against_everything_fails_that_sequence_only(harness: Harness) -> None:
    nothing = {token: float("-inf") for token in range(harness.model.vocabulary.size)}
    harness.submit(1, "Hello", 4, Sampling(temperature=0, logit_bias=nothing))
    harness.submit(2, "Hello", 4)
    harness.finish(1, 2)
    assert harness.pieces(1)[-1].finish_reason == "error"
    assert "finite" in (harness.pieces(1)[-1].error or "")
    assert harness.pieces(2)[-1].finish_reason == "length"


class FailingContext(Context):
    """A context whose next decodes fail, as a device's would."""

    failures: list[DecodeError]
    failing_code = 0

    def decode(self, batch: Batch) -> Any:
        if self.failures:
            self.last_code = self.failing_code
            raise self.failures.pop(0)
        return super().decode(batch)


@pytest.fixture
def failing(model: Model) -> Iterator[tuple[Harness, FailingContext]]:
    with FailingContext(model, slots=SLOTS, context_length=CONTEXT, batch_size=64, threads=2) as context:
        context.failures = []
        yield Harness(model, context), context


def test_a_failed_decode_ends_its_sequences_and_no_others(failing: tuple[Harness, FailingContext]) -> None:
    harness, context = failing
    harness.submit(1, "Hello", 8)
    harness.engine.step()
    context.failures = [DecodeError("llama_decode returned -2")]
    harness.engine.step()
    assert harness.pieces(1)[-1].finish_reason == "error"
    assert harness.run(2, "Hello", 3).finish_reason == "length"


def test_a_full_cache_costs_idle_prefixes_first_then_the_youngest(failing: tuple[Harness, FailingContext]) -> None:
    harness, context = failing
    harness.run(1, "An idle prefix", 2)
    harness.submit(2, "Older", 6)
    harness.submit(3, "Younger", 6)
    harness.engine.step()
    context.failures = [NoKvSlotError("full"), NoKvSlotError("full")]
    harness.engine.step()
    harness.engine.check_integrity()
    assert all(piece.finish_reason is None for request in (2, 3) for piece in harness.pieces(request))
    harness.engine.step()
    assert [message.load.preemptions for message in harness.sent if isinstance(message, Step)][-1] == 1
    harness.finish(2, 3)
    assert {harness.pieces(request)[-1].finish_reason for request in (2, 3)} == {"length"}


@pytest.mark.parametrize(("code", "failures"), [(-3, 1), (-2, 3)])
def test_a_context_beyond_repair_ends_the_engine(
    failing: tuple[Harness, FailingContext], code: int, failures: int
) -> None:
    harness, context = failing
    context.failing_code = code
    context.failures = [DecodeError(f"llama_decode returned {code}") for _ in range(failures)]
    for request in range(failures - 1):
        harness.submit(request, "Hello", 4)
        harness.engine.step()
    harness.submit(9, "Hello", 4)
    with pytest.raises(EngineError, match="beyond repair"):
        harness.engine.step()
    assert harness.pieces(9)[-1].finish_reason == "error"
