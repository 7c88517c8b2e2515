"""Prompt lookup: guesses what follows a sequence's tokens from what followed them where they occurred before. Pure.

A guess costs nothing until a step computes it, and whether it was right shows with the next token that is drawn. So how
often guesses come true is known also of a text in which none was ever computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Tokens = npt.NDArray[np.int32]

_TOKEN_BITS = 21  # of a token in a key; larger vocabularies would only make keys ambiguous
_PAIR_MASK = (1 << 2 * _TOKEN_BITS) - 1
_LONGEST_MATCH = 24  # tokens; longer ones promise no more
_BOUNDS = (2, 3, 4, 6, 9, 14, _LONGEST_MATCH)  # of the lengths of matches that are counted together
_BUCKETS = [sum(matched > bound for bound in _BOUNDS) for matched in range(_LONGEST_MATCH + 2)]
_FIRST_RATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
_LEAST_TO_RESUME = 4  # tokens of a match; shorter ones break off rather than replace a token
_FIRST_TRIALS = 8.0  # that the rates which nobody has measured yet count for
_INHERITED_TRIALS = 4.0  # that the rates a sequence begins with count for
_MOST_TRIALS = 32  # so many of the newest count; texts change
_MOST_TRIALS_OF_ALL = 512


class HitRates:
    """How often the next token is the guessed one, by how many tokens had matched before it."""

    def __init__(self, others: HitRates | None = None) -> None:
        """Begin with a guess, or half way between it and what was seen in others: a story is not like edited code."""
        seen: Sequence[float] = _FIRST_RATES if others is None else others.rates
        self.rates: list[float] = [(first + rate) / 2 for first, rate in zip(_FIRST_RATES, seen, strict=True)]
        self._trials = [_FIRST_TRIALS if others is None else _INHERITED_TRIALS] * len(self.rates)
        self._most_trials = _MOST_TRIALS_OF_ALL if others is None else _MOST_TRIALS
        self._others = others

    def observe(self, matched: int, *, hit: bool) -> None:
        """Learn whether the guess that followed a match came true."""
        bucket = _BUCKETS[min(matched, _LONGEST_MATCH + 1)]
        self._trials[bucket] = trials = min(self._trials[bucket] + 1, self._most_trials)
        self.rates[bucket] += (hit - self.rates[bucket]) / trials
        if self._others is not None:
            self._others.observe(matched, hit=hit)

    def expected(self, matched: int, most: int) -> list[float]:
        """Return how many of the next 1, 2, ... `most` guesses come true, on average, up to the first that doesn't."""
        chance, total, totals = 1.0, 0.0, []
        for depth in range(matched, matched + most):
            chance *= self.rates[_BUCKETS[min(depth, _LONGEST_MATCH + 1)]]
            total += chance
            totals.append(total)
        return totals


class _Lost(NamedTuple):
    """A match whose next token was another one: if the text goes on behind it, that one has replaced it."""

    source: int  # index of the token behind it
    matched: int
    replaced: int
    by: int


class PromptLookup:
    """One sequence's guesses. Where two or three tokens at its end occurred before, the text may go on as it did there.

    A match is followed until a token differs, then another one is looked for. Where one token has replaced another and
    the text has gone on as before, as in code with a new name, the next place is expected to do the same.
    """

    def __init__(self, tokens: Tokens, n_prompt: int, others: HitRates) -> None:
        """Index the prompt. `tokens` is the sequence's own array, which goes on growing."""
        self._tokens = tokens
        self._rates = HitRates(others)
        self._length = n_prompt  # of what is indexed
        self._source = 0  # index of the next guess in `tokens`; 0: there is none
        self._matched = 0  # tokens before it that equal those at the end
        self._lost: _Lost | None = None  # with the last token
        self._replacements: dict[int, int] = {}
        prompt = tokens[:n_prompt].astype(np.int64)
        pairs = prompt[:-1] << _TOKEN_BITS | prompt[1:]
        triples = pairs[:-1] << _TOKEN_BITS | prompt[2:]
        self._after_pair = dict(zip(pairs.tolist(), range(2, n_prompt + 1), strict=True))
        self._after_triple = dict(zip(triples.tolist(), range(3, 3 + len(triples)), strict=True))
        self._last_pair = int(pairs[-1]) if len(pairs) else int(prompt[0])

    @property
    def has_guess(self) -> bool:
        """Whether there is something to guess from."""
        return self._source > 0

    def follow(self, n_tokens: int) -> None:
        """Take in the tokens that were drawn since; there are `n_tokens` now."""
        for end in range(self._length + 1, n_tokens + 1):
            self._take(int(self._tokens[end - 1]), end)
        self._length = n_tokens

    def expected(self, most: int) -> list[float]:
        """Return how many of the next 1, 2, ... `most` guesses come true, on average."""
        return self._rates.expected(self._matched, most)

    def write(self, count: int) -> None:
        """Write guesses behind the known tokens; a match that reaches these goes on into the guesses."""
        end = self._length
        guesses = self._tokens[self._source : min(self._source + count, end)]
        self._tokens[end : end + count] = guesses if len(guesses) == count else np.resize(guesses, count)
        if self._replacements:
            for index in range(end, end + count):
                token = int(self._tokens[index])
                self._tokens[index] = self._replacements.get(token, token)

    def _take(self, token: int, end: int) -> None:
        """Take in the token before index `end`: see whether it was guessed, find a match, index it."""
        hit = bool(self._source) and self._is_guessed(token)
        lost, self._lost = self._lost, self._newly_lost(token) if self._source and not hit else None
        if lost is not None and int(self._tokens[lost.source]) == token:
            self._replacements[lost.replaced] = lost.by
            self._source, self._matched, self._lost, hit = lost.source, lost.matched, None, True
        triple = self._last_pair << _TOKEN_BITS | token
        pair = self._last_pair = triple & _PAIR_MASK
        if hit:
            self._source += 1
            self._matched += 1
        elif found := self._after_triple.get(triple) or self._after_pair.get(pair):
            self._source, self._matched = found, self._common_end(found, end)
        else:
            self._source = 0
        self._after_triple[triple] = self._after_pair[pair] = end

    def _is_guessed(self, token: int) -> bool:
        """Tell whether the drawn token is the guessed one, and learn from that."""
        plain = int(self._tokens[self._source])
        guess = self._replacements.get(plain, plain)
        self._rates.observe(self._matched, hit=guess == token)
        if guess != token == plain:
            del self._replacements[plain]
        return guess == token

    def _newly_lost(self, token: int) -> _Lost | None:
        if self._matched < _LEAST_TO_RESUME:
            return None
        return _Lost(self._source + 1, self._matched, int(self._tokens[self._source]), token)

    def _common_end(self, left: int, right: int) -> int:
        """Return how many tokens before the two indices are the same; left < right."""
        most = min(left, _LONGEST_MATCH)
        same = self._tokens[left - most : left] == self._tokens[right - most : right]
        return most - 1 - int(np.flatnonzero(~same)[-1]) if not same.all() else most
