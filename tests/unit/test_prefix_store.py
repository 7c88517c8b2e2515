"""The books of the prefixes that no slot holds."""

from __future__ import annotations

import numpy as np
import pytest

from app.worker.prefix_store import LEAST_TOKENS, PrefixStore, StoredPrefix
from app.worker.prefixes import SavingCost


def tokens(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)


def entry(count: int, first: int = 0, scope: str = "", nbytes: int = 100, file: str | None = None) -> StoredPrefix:
    return StoredPrefix(tokens(count, first), scope, nbytes, np.zeros(nbytes, np.uint8), file)


def test_the_longest_common_prefix_of_the_same_scope_is_found() -> None:
    store = PrefixStore(1000)
    short, long, foreign = entry(300), entry(500, 5), entry(400, scope="other")
    for one in (short, long, foreign):
        store.add(one)
    assert store.find(tokens(450), "") == (short, 300)
    assert store.find(tokens(450, 5), "") == (long, 449)
    assert store.find(tokens(450), "other") == (foreign, 400)
    assert store.find(tokens(450), "nobody") == (None, 0)


def test_a_state_that_cannot_be_cut_is_found_whole_or_not_at_all() -> None:
    store = PrefixStore(1000, can_rewind=False)
    one = entry(300)
    store.add(one)
    assert store.find(tokens(299), "") == (None, 0)
    assert store.find(tokens(300), "") == (None, 0)
    assert store.find(tokens(301), "") == (one, 300)


def test_what_was_used_last_stays_within_the_limit() -> None:
    store = PrefixStore(250)
    first, second, third = entry(300), entry(300, 1000), entry(300, 2000)
    store.add(first)
    store.add(second)
    store.use(first)
    store.add(third)
    assert store.find(tokens(300), "")[0] is first
    assert store.find(tokens(300, 1000), "")[0] is None
    assert store.memory_bytes == 200


def test_what_is_on_disk_loses_its_state_only() -> None:
    store = PrefixStore(100)
    filed = entry(300, file="a")
    store.add(filed)
    store.add(entry(300, 1000))
    assert store.find(tokens(300), "") == (filed, 299)
    assert filed.state is None
    store.loaded(filed, np.zeros(100, np.uint8))
    assert filed.state is not None
    assert store.memory_bytes == 100


def test_a_longer_prefix_takes_the_place_of_its_beginning() -> None:
    store = PrefixStore(1000)
    store.add(entry(300))
    store.add(entry(400))
    assert (len(store), store.memory_bytes) == (1, 100)


@pytest.mark.parametrize(("count", "wanted"), [(LEAST_TOKENS - 1, False), (LEAST_TOKENS, False), (800, True)])
def test_short_and_known_prefixes_are_not_wanted(count: int, wanted: bool) -> None:
    store = PrefixStore(1000)
    store.add(entry(500))
    assert store.is_wanted(tokens(count), "") is wanted
    assert not store.is_on_disk(tokens(count), "")


def test_what_differs_little_from_what_is_kept_is_not_wanted() -> None:
    store = PrefixStore(1000)
    known = tokens(2000)
    assert store.is_wanted(known, "", elsewhere=2000 - LEAST_TOKENS)
    assert not store.is_wanted(known, "", elsewhere=2001 - LEAST_TOKENS)
    store.add(entry(1900))
    assert not store.is_wanted(known, "")
    assert store.is_wanted(known, "other")
    uncut = PrefixStore(1000, can_rewind=False)
    uncut.add(entry(1900))
    assert uncut.is_wanted(known, "")


def test_saving_pays_where_computing_again_takes_several_times_as_long() -> None:
    cost = SavingCost()
    assert cost.pays(1000, 1e-6)
    cost.observe(1000, 0.01)
    assert cost.pays(1000, 0.1)
    assert not cost.pays(1000, 0.07)
    assert cost.pays(500, 0.07)
    assert sum(cost.pays(1000, 1e-6) for _ in range(1000)) == 10
