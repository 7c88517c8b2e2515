"""What samplers remember of a history: counts and repetitions kept up token by token are those taken anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.messages import Sampling
from app.worker.sampling.breakers import Breakers, BreakerTable
from app.worker.sampling.dry import Dry
from app.worker.sampling.penalties import TokenCounts

WINDOWS = st.sampled_from([-1, 1, 2, 3, 10, 64, 500])
TOKENS = st.lists(st.integers(0, 4), min_size=1, max_size=60)
CUTS = st.lists(st.integers(1, 60), max_size=6)
BREAKERS = Breakers({3: ((4, 4), (1,)), 4: ((2, 2, 2),)}, frozenset())
SINGLE = Breakers({3: ((),), 1: ((0, 0), ())}, frozenset({3, 1}))


def stages(tokens: list[int], cuts: list[int]) -> list[np.ndarray]:
    """Return histories of different lengths of the same tokens: mostly growing, sometimes cut back."""
    history = np.array(tokens, np.int32)
    return [history[: min(cut, len(history))] for cut in cuts] + [history[: n + 1] for n in range(len(history))]


@settings(deadline=None, max_examples=80)
@given(TOKENS, CUTS, WINDOWS)
def test_counts_are_those_of_the_window(tokens: list[int], cuts: list[int], window: int) -> None:
    counted = TokenCounts(window)
    for history in stages(tokens, cuts):
        counted.follow(history)
        ids, counts = np.unique(history if window < 0 else history[-window:], return_counts=True)
        assert dict(zip(counted.ids.tolist(), counted.counts.tolist(), strict=True)) == dict(
            zip(ids.tolist(), counts.tolist(), strict=True)
        )


def test_counts_of_many_different_tokens() -> None:
    history = np.random.default_rng(0).permutation(3000).astype(np.int32)
    counted, fresh = TokenCounts(1000), TokenCounts(1000)
    for length in range(1, 3001, 7):
        counted.follow(history[:length])
    fresh.follow(history[:length])
    assert sorted(counted.ids.tolist()) == sorted(fresh.ids.tolist())
    assert counted.counts.tolist() == fresh.counts.tolist() == [1.0] * 1000


@settings(deadline=None, max_examples=80)
@given(TOKENS, CUTS, WINDOWS, st.integers(0, 3), st.sampled_from([Breakers({}, frozenset()), BREAKERS, SINGLE]))
def test_repetitions_are_those_of_the_window(
    tokens: list[int], cuts: list[int], window: int, allowed: int, breakers: Breakers
) -> None:
    sampling = Sampling(dry_multiplier=0.7, dry_base=1.5, dry_allowed_length=allowed, dry_penalty_last_n=window)
    followed = Dry(sampling, breakers)
    for history in stages(tokens, cuts):
        ids, amounts = followed.penalties(history)
        expected = plain_dry(history.tolist() if window < 0 else history[-window:].tolist(), allowed, breakers)
        got = dict(zip(ids.tolist(), amounts.tolist(), strict=True))
        assert got == {token: pytest.approx(0.7 * 1.5 ** (length - allowed)) for token, length in expected.items()}


def plain_dry(window: list[int], allowed: int, breakers: Breakers) -> dict[int, int]:
    """Return the tokens that would continue a repetition, and its length, in the plainest way."""
    size, limit = len(window), len(window)
    for back in range(size):
        head = size - 1 - back
        tails = [t for t in breakers.tails.get(window[head], ()) if tuple(window[head + 1 :][: len(t)]) == t]
        if tails:
            limit = back - max(map(len, tails))
            break
    if size <= allowed or limit < allowed:
        return {}
    longest: dict[int, int] = {}
    for place in range(size - 1):
        length = 0
        while length <= place and window[place - length] == window[size - 1 - length]:
            length += 1
        token = window[place + 1]
        if min(length, limit) >= allowed and token not in breakers.singles:
            longest[token] = max(longest.get(token, 0), min(length, limit))
    return longest


def test_a_long_repetition_is_bounded() -> None:
    dry = Dry(Sampling(dry_multiplier=5.0, dry_base=4.0, dry_penalty_last_n=-1))
    ids, amounts = dry.penalties(np.zeros(5000, np.int32))
    assert ids.tolist() == [0]
    assert amounts[0] > 1e37


class TestBreakerTable:
    WORDS = (b"a", b"", b"ab", b"b:", b":", b"xa", b"aa", b"\n\n", b"b", b"aba")

    def table(self) -> BreakerTable:
        return BreakerTable(lambda: self.WORDS, lambda text: np.frombuffer(text, np.uint8).astype(np.int32))

    def test_tokens_that_hold_the_text(self) -> None:
        assert self.table().find([":"]) == Breakers({3: ((),), 4: ((),)}, frozenset({3, 4}))
        assert self.table().find(["\n"]).singles == {7}

    def test_tokens_that_begin_it(self) -> None:
        a, b = ord("a"), ord("b")
        found = self.table().find(["ab"])
        assert found.singles == {2, 9}
        assert found.tails == {0: ((b,),), 2: ((),), 5: ((b,),), 6: ((b,),), 9: ((),)}
        assert self.table().find(["aab"]).tails == {0: ((a, b),), 5: ((a, b),), 6: ((a, b), (b,)), 9: ((a, b),)}

    def test_a_text_does_not_reach_from_one_word_into_the_next(self) -> None:
        assert self.table().find(["b:b"]).singles == frozenset()
        assert self.table().find(["aa"]).singles == {6}

    def test_many_texts_add_up_and_long_tails_are_cut(self) -> None:
        table = self.table()
        assert table.find([":", "\n", ":"]).singles == {3, 4, 7}
        assert len(table.find(["a" + "é" * 15]).tails[0][0]) == 20
        for letter in range(200):
            table.find([chr(0x4E00 + letter)])
        assert table.find([":"]).singles == {3, 4}
