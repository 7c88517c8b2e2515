"""Who would wait in vain is told so at once; nobody is refused on a guess."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest

from app.errors import DeadlineTooShortError, DeadlineUnreachableError
from app.messages import Generate, Sampling
from app.pool.admission import Admission
from app.pool.forecast import Forecast, SeenPrompts
from app.pool.request import GenerationRequest, Patience, TokenPrompt


def ids(*tokens: int) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)


def request(seconds: float | None, **changes: Any) -> GenerationRequest:
    patience = None if seconds is None else Patience("x-request-timeout", seconds)
    asked = GenerationRequest(
        prompts=[TokenPrompt([1])],
        max_tokens=None,
        sampling=Sampling(),
        stop=[],
        ignore_eos=False,
        top_logprobs=None,
        request_id="r",
        patience=patience,
    )
    return msgspec.structs.replace(asked, **changes)


def sequence(prompt_tokens: int = 1000, max_tokens: int = 500, min_tokens: int = 0) -> Generate:
    return Generate(1, ids(*range(prompt_tokens)), max_tokens, Sampling(), min_tokens=min_tokens)


def measured(slots: int = 2, queue: int = 100) -> Admission:
    """Return an admission that has seen 100 prompt tokens a second, 10 tokens a second drawn, answers of 50 tokens."""
    admission = Admission(slots, queue)
    for _ in range(400):
        admission.pace.step(1, 0.1)
        admission.pace.answer(50)
    for _ in range(40):
        admission.pace.step(0, 1.0, 100)
    for _ in range(400):
        admission.pace.step(1, 0.1)
    return admission


def check(admission: Admission, asked: GenerationRequest, *sequences: Generate, disk: bool = False) -> None:
    admission.take(len(sequences))
    Forecast(admission, keeps_on_disk=disk).check(asked, list(sequences))


def test_nothing_is_refused_before_anything_is_known() -> None:
    check(Admission(1, 100), request(0.001, ignore_eos=True), sequence())


def test_nobody_is_refused_who_says_nothing() -> None:
    check(measured(), request(None, ignore_eos=True), sequence(100_000, 100_000))


def test_a_long_prompt() -> None:
    words = r"at least 10\.0 s.*1000 tokens of the prompt.*you wait 5 s"
    with pytest.raises(DeadlineTooShortError, match=words) as caught:
        check(measured(), request(5, streams=True), sequence())
    assert (caught.value.status, caught.value.param) == (400, "x-request-timeout")
    check(measured(), request(9, streams=True), sequence())  # within the doubt of an estimate


def test_an_answer_whose_length_is_known() -> None:
    asked = request(20, ignore_eos=True)
    with pytest.raises(DeadlineTooShortError, match="500 tokens of the answer"):
        check(measured(), asked, sequence(1))
    check(measured(), msgspec.structs.replace(asked, streams=True), sequence(1))
    check(measured(), request(20), sequence(1))  # it may end at any token
    check(measured(), request(20, ignore_eos=True, stop=["x"]), sequence(1))
    with pytest.raises(DeadlineTooShortError):
        check(measured(), request(20), sequence(1, min_tokens=400))


def test_behind_others() -> None:
    admission = measured()
    admission.take(12)
    with pytest.raises(DeadlineUnreachableError, match="behind 11 other sequences") as caught:
        check(admission, request(10, streams=True), sequence(1))
    assert caught.value.status == 429
    assert caught.value.retry_after == pytest.approx(50, rel=0.3)
    admission = measured()
    admission.take(1)
    check(admission, request(0.1, streams=True), sequence(1))  # a slot is free
    check(admission, request(0.1, streams=True), sequence(1))  # the next to end may do so at once


def test_what_the_cache_may_hold_counts_for_nothing() -> None:
    admission = measured()
    admission.take(1)
    forecast = Forecast(admission, keeps_on_disk=False)
    forecast.seen.add(ids(*range(900)))
    forecast.check(request(5, streams=True), [sequence()])
    with pytest.raises(DeadlineTooShortError):
        Forecast(admission, keeps_on_disk=False).check(request(5, streams=True), [sequence()])
    Forecast(admission, keeps_on_disk=True).check(request(5, streams=True), [sequence()])


def test_of_an_earlier_prompt_only_the_beginning() -> None:
    seen = SeenPrompts()
    assert seen.most_cached(ids(1, 2, 3)) == 0
    seen.add(ids(1, 2, 9, 9, 9))
    assert seen.most_cached(ids(1, 2, 3)) == 2
    assert seen.most_cached(ids(4, 2, 3)) == 0
    seen.add(ids(1, 2))
    assert seen.most_cached(ids(1, 2, 3)) == 3  # the answer to it may go on in this one
    assert seen.most_cached(ids(1, 2)) == 2


def test_memory_is_bounded() -> None:
    seen = SeenPrompts()
    for first in range(40):
        seen.add(ids(first) * 250_000)
    assert len(seen) == 16 * 1024 * 1024 // 1_000_000
    assert seen.most_cached(ids(0, 0)) == 2  # forgotten: it may be cached
    assert seen.most_cached(ids(39, 39, 39)) == 3


def test_a_short_prompt_says_nothing_of_others() -> None:
    seen = SeenPrompts()
    seen.add(ids(7))
    assert seen.most_cached(ids(*range(100, 200))) == 0
    assert seen.most_cached(ids(7, 8, 9)) == 3


def test_what_was_forgotten_may_be_cached() -> None:
    seen = SeenPrompts()
    for number in range(1024):
        seen.add(ids(number, number, number))
    assert seen.most_cached(ids(5000, 1, 1)) == 0
    seen.add(ids(1024, 1024, 1024))
    assert len(seen) == 1024
    assert seen.most_cached(ids(5000, 1, 1)) == 3
