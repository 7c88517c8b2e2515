"""DRY ("don't repeat yourself"): a token that would continue a repetition pays, the more the longer it is.

The same as llama.cpp's: for each earlier place, how many tokens before it equal the tokens at the history's end. These
lengths are kept up from token to token, in one numpy operation each.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from app.worker.sampling.breakers import LONGEST_TAIL, NO_BREAKERS

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.messages import Sampling
    from app.worker.sampling.breakers import Breakers

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.intp]
    Tokens = npt.NDArray[np.int32]

_MOST_STEPS = 16  # more new tokens than these are compared faster all at once
_LARGEST_LOGARITHM = np.float32(88.7228391)  # of a float32


class Dry:
    """One sequence's repetitions, over one growing history."""

    def __init__(self, sampling: Sampling, breakers: Breakers = NO_BREAKERS) -> None:
        """Penalise as `sampling` says; a repetition does not go on across `breakers`."""
        self._multiplier = float(np.float32(sampling.dry_multiplier))
        base = np.float32(sampling.dry_base)
        self._base = float(base)
        self._allowed = sampling.dry_allowed_length
        self._window = sampling.dry_penalty_last_n
        self._largest_exponent = int(_LARGEST_LOGARITHM / np.float32(math.log(base))) if base > 1.000001 else 0
        self._breakers = breakers
        self._length = 0  # of the history that is known
        self._start = 0  # of the window
        self._repeats = np.empty(0, np.int32)  # for each token from the start on but the last: what equals the end
        self._settled = 0  # heads of breakers before this index can match no more than they do
        self._settled_break = -1  # index after the last breaker with such a head
        self._settled_head = -1

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        """Return whether this way of drawing has the penalty."""
        return sampling.dry_multiplier > 0 and sampling.dry_base >= 1 and sampling.dry_penalty_last_n != 0

    def penalties(self, history: Tokens) -> tuple[Ids, Floats]:
        """Return the tokens that would continue a repetition and what to subtract from their logits.

        `history` is the one of the last call, grown by some tokens, or a shorter one.
        """
        self._follow(history)
        size = len(history) - self._start
        limit = self._unbroken(history)
        if size <= self._allowed or limit < self._allowed:
            return np.empty(0, np.intp), np.empty(0, np.float32)
        repeats = np.minimum(self._repeats, limit)
        places = np.flatnonzero(repeats >= self._allowed)
        tokens = history[self._start + 1 + places]
        ids, inverse = np.unique(tokens, return_inverse=True)
        longest = np.zeros(len(ids), np.int32)
        np.maximum.at(longest, inverse, repeats[places])
        free = self._breakers.singles
        if free and len(ids):
            kept = np.array([token not in free for token in ids.tolist()])
            ids, longest = ids[kept], longest[kept]
        exponents = longest - self._allowed
        if self._largest_exponent:
            exponents = np.minimum(exponents, self._largest_exponent)
        with np.errstate(over="ignore"):
            amounts = (self._multiplier * np.power(self._base, exponents.astype(np.float64))).astype(np.float32)
        return ids.astype(np.intp), amounts

    def _follow(self, history: Tokens) -> None:
        length = len(history)
        if length < self._length:
            self._length = self._settled = 0
            self._settled_break = self._settled_head = -1
        start = 0 if self._window < 0 else max(0, length - self._window)
        if self._length == 0 or length - self._length > _MOST_STEPS:
            self._repeats = _repeats_of_the_end(history[start:])
            self._start = start
        else:
            for index in range(self._length, length):
                self._grow(history, index)
        self._length = length

    def _grow(self, history: Tokens, index: int) -> None:
        """Take in the token at the index: a repetition there goes on, or ends."""
        start = 0 if self._window < 0 else max(0, index + 1 - self._window)
        before = self._repeats if start > self._start else np.concatenate([np.zeros(1, np.int32), self._repeats])
        repeats = (before + 1) * (history[start:index] == history[index])
        self._repeats = np.minimum(repeats, np.arange(1, len(repeats) + 1)).astype(np.int32)
        self._start = start

    def _unbroken(self, history: Tokens) -> int:
        """Return how many tokens at the end follow the last breaker; all of the window without one."""
        size = len(history) - self._start
        if not self._breakers.tails:
            return size
        recent = max(self._start, len(history) - 1 - LONGEST_TAIL)
        for head in range(len(history) - 1, recent - 1, -1):
            if (end := self._breakers.end_of(history, head)) is not None:
                return len(history) - end
        for head in range(recent - 1, max(self._settled, self._start) - 1, -1):
            if (end := self._breakers.end_of(history, head)) is not None:
                self._settled_head, self._settled_break = head, end
                break
        self._settled = recent
        return len(history) - self._settled_break if self._settled_head >= self._start else size


def _repeats_of_the_end(tokens: Tokens) -> npt.NDArray[np.int32]:
    """Return for each token but the last how many tokens up to it equal those at the end (the Z algorithm)."""
    backwards = tokens[::-1].tolist()
    size = len(backwards)
    lengths = [0] * size
    left = right = 0  # the stretch [left, right) equals the beginning
    for place in range(1, size):
        length = min(right - place, lengths[place - left]) if place < right else 0
        while place + length < size and backwards[length] == backwards[place + length]:
            length += 1
        if place + length > right:
            left, right = place, place + length
        lengths[place] = length
    return np.array(lengths[:0:-1], np.int32)
