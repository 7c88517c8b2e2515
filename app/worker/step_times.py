"""What guesses cost: how long steps with and without them take, and what they may cost all in all. Pure."""

from __future__ import annotations

from typing import Literal, NamedTuple

Source = Literal["lookup", "draft"]  # where guesses come from
_Shape = tuple[Source, int, int]  # the lengths in bits of the numbers of streams and of guesses

_WEIGHT_OF_NEWEST = 0.2
_SLOWEST = 2.0  # times the average: a step that took longer was disturbed
_LEAST_COST = 1e-3  # of a guess, in a stream's share of a step
_FIRST_CREDIT = 3.0  # steps without guesses
_MOST_CREDIT = 16.0
_PART_TO_RISK = 0.01  # of the time of steps without guesses
_FORGET_AFTER = 2048  # steps: what looked bad is tried again in time
_LEAST_REMEMBERED = 0.5


class _Average(NamedTuple):
    value: float
    measured: int = 0  # times
    newest: int = 0  # number of the step that was measured last


class StepTimes:
    """How long steps take: with so many streams, and what a guess adds.

    That is kept in a stream's share of a step without guesses, for steps with about as many streams and guesses: few
    of all possible steps ever come twice.
    """

    def __init__(self) -> None:
        """Start without a measurement."""
        self._plain: dict[int, _Average] = {}  # seconds, by streams
        self._guess: dict[_Shape, _Average] = {}
        self._steps = 0
        self._last_guessed = False
        self._switch = 0.0  # what a step without guesses takes longer after one with guesses, as a part of it

    def observe(self, streams: int, guesses: int, seconds: float, source: Source = "lookup") -> None:
        """Learn from a step with so many guesses, of all its streams together."""
        self._steps += 1
        switched, self._last_guessed = self._last_guessed and not guesses, guesses > 0
        plain = self.without_guesses(streams)
        if plain is None:
            if not guesses:
                self._plain[streams] = _Average(seconds, 1, self._steps)
        elif switched:
            self._switch += _WEIGHT_OF_NEWEST * (min(max(seconds / plain - 1, 0.0), 1.0) - self._switch)
        elif not guesses:
            self._plain[streams] = self._followed(self._plain[streams], seconds)
        else:
            shape = source, streams.bit_length(), guesses.bit_length()
            cost = max(seconds / plain - 1, _LEAST_COST) * streams / guesses
            self._guess[shape] = self._followed(self._guess.get(shape, _Average(cost)), cost)

    def without_guesses(self, streams: int) -> float | None:
        """Return how many seconds a step without guesses takes, None if there was none."""
        known = self._plain.get(streams)
        return None if known is None else known.value

    def with_guesses(self, streams: int, guesses: int, token_seconds: float = 0.0, source: Source = "lookup") -> float:
        """Return how many times as long as without guesses a step takes, or could take.

        Where none has been measured, a guess is believed to take `token_seconds`.
        """
        known = self._guess.get((source, streams.bit_length(), guesses.bit_length()))
        if known is None:
            plain = self.without_guesses(streams)
            return 1 + (guesses * token_seconds / plain if plain else 0.0) + self._switch
        forgotten = max(1 - (self._steps - known.newest) / _FORGET_AFTER, _LEAST_REMEMBERED)
        return 1 + known.value * forgotten * guesses / streams + self._switch

    def _followed(self, known: _Average, newest: float) -> _Average:
        weight = max(1 / (known.measured + 1), _WEIGHT_OF_NEWEST)
        average = known.value + weight * (min(newest, _SLOWEST * known.value) - known.value)
        return _Average(average, known.measured + 1, self._steps)


class Ledger:
    """What guesses have gained and cost, in steps without guesses: so much may be risked.

    All in all, guesses that never come true cost what there is at first and then a small part of the time.
    """

    def __init__(self) -> None:
        self.credit = _FIRST_CREDIT

    def plain_step(self) -> None:
        """Note a step without guesses."""
        self.credit = min(self.credit + _PART_TO_RISK, _MOST_CREDIT)

    def guessing_step(self, relative_time: float) -> None:
        """Note a step with guesses that took so many times as long as one without."""
        self.credit = max(self.credit - (relative_time - 1), -_FIRST_CREDIT)

    def came_true(self, steps: float) -> None:
        """Note that guesses have saved so many steps."""
        self.credit = min(self.credit + steps, _MOST_CREDIT)
