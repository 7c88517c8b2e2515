"""Penalties on tokens that have occurred: the counts of each sequence are kept up, not taken anew at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from app.messages import Sampling

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.intp]
    Tokens = npt.NDArray[np.int32]

_MOST_STEPS = 64  # more new tokens than these are counted faster all at once


class TokenCounts:
    """How often each token occurs among the last tokens of one growing history."""

    def __init__(self, window: int) -> None:
        """Look back on `window` tokens; on all when it is negative."""
        self._window = window
        self._length = 0  # of the history that is counted
        self._places: dict[int, int] = {}  # of a token in the arrays
        self._ids = np.empty(0, np.intp)
        self._counts = np.empty(0, np.float32)

    @property
    def ids(self) -> Ids:
        """The tokens that occur, in no order."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Floats:
        """How often each of `ids` occurs."""
        return self._counts[: len(self._places)]

    def follow(self, history: Tokens) -> None:
        """Count a history: the one that was counted before, grown by some tokens, or a shorter one."""
        new = len(history) - self._length
        if not 0 <= new <= _MOST_STEPS or self._length == 0:
            self._count_all(history)
        else:
            for index in range(self._length, len(history)):
                self._add(int(history[index]))
                if 0 < self._window <= index:
                    self._remove(int(history[index - self._window]))
        self._length = len(history)

    def _count_all(self, history: Tokens) -> None:
        window = history if self._window < 0 else history[max(0, len(history) - self._window) :]
        ids, counts = np.unique(window, return_counts=True)
        self._places = {token: place for place, token in enumerate(ids.tolist())}
        self._ids = np.empty(len(ids) + _MOST_STEPS, np.intp)
        self._counts = np.empty(len(self._ids), np.float32)
        self._ids[: len(ids)] = ids
        self._counts[: len(ids)] = counts

    def _add(self, token: int) -> None:
        place = self._places.get(token)
        if place is not None:
            self._counts[place] += 1
            return
        place = self._places[token] = len(self._places)
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
        self._ids[place] = token
        self._counts[place] = 1

    def _remove(self, token: int) -> None:
        place = self._places[token]
        self._counts[place] -= 1
        if self._counts[place]:
            return
        last = len(self._places) - 1
        moved = int(self._ids[last])
        self._ids[place], self._counts[place] = moved, self._counts[last]
        self._places[moved] = place
        del self._places[token]


class Penalties:
    """One sequence's repeat, frequency and presence penalties."""

    def __init__(self, sampling: Sampling) -> None:
        self.numbers = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        self.occurred = TokenCounts(sampling.repeat_last_n)

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        """Return whether this way of drawing has penalties."""
        neutral = sampling.repeat_penalty == 1 and not sampling.frequency_penalty and not sampling.presence_penalty
        return not neutral and sampling.repeat_last_n != 0


def penalize(logits: Floats, rows: Sequence[int], penalties: Sequence[Penalties]) -> None:
    """Apply each sequence's penalties to its row of the logits in place, all rows at once."""
    lengths = [len(one.occurred.ids) for one in penalties]
    ids = np.concatenate([one.occurred.ids for one in penalties])
    counts = np.concatenate([one.occurred.counts for one in penalties])
    lines = np.repeat(np.array(rows, np.intp), lengths)
    numbers = np.array([one.numbers for one in penalties], np.float32).repeat(lengths, axis=0)
    values = logits[lines, ids]
    values = np.where(values <= 0, values * numbers[:, 0], values / numbers[:, 0])
    logits[lines, ids] = values - (counts * numbers[:, 1] + numbers[:, 2])
