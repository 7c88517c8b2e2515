"""How often a draft model guesses right: known only of guesses that were computed. Pure."""

from __future__ import annotations

_FIRST_RATE = 0.7
_FIRST_TRIALS = 4.0
_MOST_TRIALS = 64.0
_RECOVERY = 0.003  # of the way back, for each step: what was bad once may be tried again


class DraftRate:
    """Of one sequence, or of all."""

    def __init__(self, others: DraftRate | None = None) -> None:
        """Begin with what was seen in others, or with a guess."""
        self.rate: float = _FIRST_RATE if others is None else others.rate
        self._trials = _FIRST_TRIALS
        self._others = others

    def observe(self, guesses: int, accepted: int) -> None:
        """Learn from a step: the guesses behind the first wrong one say nothing."""
        for hit in (1,) * accepted + (0,) * (accepted < guesses):
            self._trials = min(self._trials + 1, _MOST_TRIALS)
            self.rate += (hit - self.rate) / self._trials
        if self._others is not None:
            self._others.observe(guesses, accepted)

    def expected(self, most: int) -> list[float]:
        """Return how many of the next 1, 2, ... `most` guesses come true, on average."""
        self.rate += _RECOVERY * (_FIRST_RATE - self.rate)
        chance, total, totals = 1.0, 0.0, []
        for _ in range(most):
            chance *= self.rate
            total += chance
            totals.append(total)
        return totals
