"""Which slot a prompt gets, and how much of it is already there."""

from __future__ import annotations

import numpy as np
import pytest

from app.worker.kv import KvCache, common_prefix


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def fill(cache: KvCache, *values: int) -> int:
    """Run a sequence of these tokens through the cache; return its slot."""
    slot = cache.take(tokens(*values), len(values)).slot
    slot.length = len(values)
    cache.release(slot)
    return slot.index


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [((), (1,), 0), ((1, 2), (1, 2), 2), ((1, 2, 3), (1, 2), 2), ((1, 2), (1, 3), 1), ((2,), (1,), 0)],
)
def test_common_prefix(left: tuple[int, ...], right: tuple[int, ...], expected: int) -> None:
    assert common_prefix(tokens(*left), tokens(*right)) == expected


def test_the_longest_prefix_wins() -> None:
    cache = KvCache(3)
    fill(cache, 1, 2, 3, 9)
    fill(cache, 5, 6, 7, 8)
    placement = cache.take(tokens(5, 6, 7, 1), 4)
    assert (placement.slot.index, placement.cached, placement.slot.length) == (1, 3, 3)


def test_one_prompt_token_is_always_left_to_compute() -> None:
    cache = KvCache(1)
    fill(cache, 1, 2, 3)
    assert cache.take(tokens(1, 2, 3), 3).cached == 2


def test_without_a_prefix_the_least_recently_used_slot_is_taken() -> None:
    cache = KvCache(3)
    assert [fill(cache, value) for value in (10, 20, 30, 40)] == [0, 1, 2, 0]


def test_a_gap_between_busy_slots_is_filled_first() -> None:
    cache = KvCache(4)
    for value in (10, 20, 30, 40):
        fill(cache, value)
    first = cache.take(tokens(30, 31), 2).slot
    assert first.index == 2
    second = cache.take(tokens(99), 1).slot
    assert second.index in (1, 3)


def test_a_busy_slot_is_never_taken_twice() -> None:
    cache = KvCache(2)
    first = cache.take(tokens(1, 2), 2).slot
    second = cache.take(tokens(1, 2), 2).slot
    assert first.index != second.index
    assert not cache.has_idle
    with pytest.raises(ValueError, match="empty"):
        cache.take(tokens(1), 1)


@pytest.mark.parametrize(("prompt", "expected"), [((1, 2, 3, 4), 3), ((1, 2, 9), 0), ((1, 2, 3), 0), ((1, 2), 0)])
def test_memory_that_cannot_rewind_is_reused_whole_or_not_at_all(prompt: tuple[int, ...], expected: int) -> None:
    cache = KvCache(1, can_rewind=False)
    fill(cache, 1, 2, 3)
    placement = cache.take(tokens(*prompt), len(prompt))
    assert (placement.cached, placement.slot.length) == (expected, expected)


def test_differences_name_the_slot() -> None:
    cache = KvCache(2)
    fill(cache, 1, 2, 3)
    assert cache.differences([3, 0]) == []
    assert cache.differences([2, 0]) == ["slot 0: 3 tokens in the books, 2 in llama.cpp's memory"]


def test_a_placement_says_how_much_of_what_it_evicts_another_slot_holds() -> None:
    cache = KvCache(2)
    for values in ((1, 2, 3, 4), (1, 2, 3, 9)):
        cache.take(tokens(*values), 4).slot.length = 4
    cache.release(cache.slots[0])
    placement = cache.take(tokens(50, 51), 2)
    assert placement.evicted.tolist() == [1, 2, 3, 4]
    assert placement.evicted_elsewhere == 3


@pytest.mark.parametrize(("other", "elsewhere"), [((1, 2, 3, 4), 4), ((1, 2, 3, 4, 5), 0), ((1, 2, 3), 0)])
def test_what_cannot_be_cut_is_held_elsewhere_only_as_it_is(other: tuple[int, ...], elsewhere: int) -> None:
    cache = KvCache(2, can_rewind=False)
    for values in ((1, 2, 3, 4), other):
        cache.take(tokens(*values), len(values)).slot.length = len(values)
    cache.release(cache.slots[0])
    assert cache.take(tokens(50, 51), 2).evicted_elsewhere == elsewhere
