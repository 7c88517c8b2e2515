"""Permits are bounded, and the no carries a time that follows the measured pace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import QueueFullError, RequestError
from app.pool.admission import Admission


def test_slots_and_queue_are_all_there_is() -> None:
    admission = Admission(slots=2, queue=1)
    admission.take(2)
    assert admission.waiting == 0
    admission.take(1)
    assert admission.waiting == 1
    with pytest.raises(QueueFullError, match="3 of 3") as caught:
        admission.take(1)
    assert caught.value.status == 429
    assert caught.value.retry_after == 1.0
    admission.give_back(1)
    admission.take(1)


def test_a_refusal_takes_nothing() -> None:
    admission = Admission(slots=2, queue=1)
    admission.take(2)
    with pytest.raises(QueueFullError):
        admission.take(2)
    assert admission.taken == 2


def test_what_can_never_fit_is_the_clients_fault() -> None:
    with pytest.raises(RequestError, match=r"5 sequences.*holds 3") as caught:
        Admission(slots=2, queue=1).take(5)
    assert caught.value.param == "n"
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("tokens_a_second", "answers", "expected"),
    [(100, 50, 10.0), (1000, 1, 1.0), (1, 500, 60.0)],  # (19 waiting + 1 asking) * answer / rate, within 1 to 60
)
def test_retry_after_follows_pace_and_queue(tokens_a_second: int, answers: int, expected: float) -> None:
    admission = Admission(slots=1, queue=19)
    for _ in range(300):
        admission.pace.step(tokens=tokens_a_second, seconds=1.0)
        admission.pace.answer(answers)
    admission.take(20)
    with pytest.raises(QueueFullError) as caught:
        admission.take(1)
    assert caught.value.retry_after == pytest.approx(expected, rel=0.01)


@given(st.lists(st.integers(1, 4), max_size=60), st.integers(1, 4), st.integers(0, 8))
def test_never_more_than_the_capacity(wishes: list[int], slots: int, queue: int) -> None:
    admission = Admission(slots, queue)
    held: list[int] = []
    for number, wish in enumerate(wishes):
        if wish > slots + queue:
            with pytest.raises(RequestError):
                admission.take(wish)
        elif sum(held) + wish > slots + queue:
            with pytest.raises(QueueFullError) as caught:
                admission.take(wish)
            assert 1 <= (caught.value.retry_after or 0) <= 60
        else:
            admission.take(wish)
            held.append(wish)
        if number % 3 == 0 and held:
            admission.give_back(held.pop(0))
        assert admission.taken == sum(held) <= slots + queue
