"""What is guessed from a text's own repetitions, and how often that comes true."""

from __future__ import annotations

import numpy as np
import pytest

from app.worker.lookup import HitRates, PromptLookup


def lookup_of(prompt: list[int], answer: list[int], room: int = 20) -> tuple[PromptLookup, np.ndarray]:
    tokens = np.full(len(prompt) + len(answer) + room, -1, np.int32)
    tokens[: len(prompt) + len(answer)] = prompt + answer
    lookup = PromptLookup(tokens, len(prompt), HitRates())
    lookup.follow(len(prompt) + len(answer))
    return lookup, tokens


def guesses(prompt: list[int], answer: list[int], count: int) -> list[int]:
    lookup, tokens = lookup_of(prompt, answer)
    if not lookup.has_guess:
        return []
    lookup.write(count)
    end = len(prompt) + len(answer)
    assert tokens[end + count] == -1
    return tokens[end : end + count].tolist()


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    assert guesses([1, 2, 3, 4, 5, 6, 7], [2, 3], 3) == [4, 5, 6]
    assert guesses([1, 2, 3, 4, 5, 6, 7], [9, 3], 3) == []
    assert guesses([1], [2, 3], 3) == []


def test_three_tokens_are_a_better_match_than_two_and_the_newest_counts() -> None:
    assert guesses([1, 2, 3, 40, 9, 2, 3, 50], [1, 2, 3], 1) == [40]
    assert guesses([1, 2, 3, 40, 1, 2, 3, 50], [1, 2, 3], 1) == [50]


def test_a_match_is_followed_until_a_token_differs() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 8, 8, 3, 4, 99]
    assert guesses(prompt, [1, 2, 3, 4], 2) == [5, 6]  # not 99, although that place is newer
    assert guesses(prompt, [1, 2, 3, 4, 7], 2) == []


def test_a_replaced_token_is_replaced_in_the_next_place_too() -> None:
    line = [50, 51, 9, 52, 53]
    prompt = [1, *line, 2, *line, 3, *line, 4]
    assert guesses(prompt, [1, 50, 51, 8], 2) == []
    assert guesses(prompt, [1, 50, 51, 8, 52], 8) == []  # three tokens are no match to go on with
    before = [60, 61, 62]
    prompt = [*before, 1, *line, 2, *line, 3, *line, 4, 5]
    answer = [*before, 1, 50, 51, 8]
    assert guesses(prompt, answer, 2) == []
    assert guesses(prompt, [*answer, 52], 9) == [53, 2, 50, 51, 8, 52, 53, 3, 50]
    kept = [*answer, 52, 53, 2, 50, 51, 9, 52]  # this time it was not replaced
    assert 8 not in guesses(prompt, kept, 6)


def test_a_match_that_reaches_the_end_goes_round() -> None:
    assert guesses([7], [1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert guesses([5, 5, 5], [5], 4) == [5, 5, 5, 5]


def test_hit_rates_are_learned_by_the_length_of_the_match_and_passed_on() -> None:
    everyone = HitRates()
    mine = HitRates(everyone)
    before = mine.expected(2, 1)[0]
    for _ in range(40):
        mine.observe(2, hit=False)
        mine.observe(10, hit=True)
    assert mine.expected(2, 1)[0] < 0.07 < before
    assert mine.expected(10, 4)[-1] > 3.5
    assert mine.expected(2, 3)[-1] < 0.14
    assert HitRates(everyone).expected(2, 1)[0] < before


def test_expected_guesses_are_chances_of_unbroken_runs() -> None:
    first, second, third = HitRates().expected(3, 3)
    assert first < second < third < 3 * first + 1
    assert second - first == pytest.approx(first * HitRates().expected(4, 1)[0])


def test_a_copied_text_is_followed_with_growing_trust() -> None:
    text = list(range(100, 160))
    lookup, _ = lookup_of(text, text[:5])
    early = lookup.expected(7)[-1]
    lookup, _ = lookup_of(text, text[:40])
    assert early < 4 < 5.5 < lookup.expected(7)[-1]
