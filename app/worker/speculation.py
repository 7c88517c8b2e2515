"""How many guesses a step of the streams computes beside their tokens: as many as pay. Pure.

A step with guesses takes longer and yields more tokens. How long it takes is measured for every shape of step, how many
guesses come true is known from the text (`lookup`), and the shape that promises the most tokens a second is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from app.worker.lookup import HitRates, PromptLookup

if TYPE_CHECKING:
    from app.worker.sequence import Sequence

_COUNTS = (1, 3, 7, 15, 31)  # guesses of one sequence: with its own token, kernels for many rows are filled
_LEAST_GAIN = 1.1  # a step with guesses must promise so many times the tokens a second
_LEAST_EXPECTED = 0.25  # guesses that come true; less is not worth looking at
_WEIGHT_OF_NEWEST = 0.2
_SLOWEST = 2.0  # times the average: a step that took longer was disturbed
_FIRST_COST = 0.5  # of a guess, in a stream's share of a step, until one has been measured
_HOPE = 0.6  # times the cost of a guess in other shapes of step: what has never been measured shall be tried
_FIRST_CREDIT = 3.0  # steps without guesses
_MOST_CREDIT = 16.0
_PART_TO_RISK = 0.01  # of the time of steps without guesses
_FORGET_AFTER = 2048  # steps: a shape that looked bad is tried again in time
_LEAST_REMEMBERED = 0.5
_MANY = 64  # guesses of all sequences in a step; a row of logits of each is memory


def guesses_in_step(slots: int, most: int) -> int:
    """Return how many guesses a step may hold that gives `slots` sequences up to `most` each."""
    return min(slots * most, max(most, _MANY))


class Shape(NamedTuple):
    """A step of `streams` sequences of which `guessing` bring as many `guesses` each."""

    streams: int
    guessing: int = 0
    guesses: int = 0


class StepTimes:
    """How long steps of each shape take, in seconds."""

    def __init__(self) -> None:
        """Start without a measurement."""
        self._averages: dict[Shape, tuple[float, int, int]] = {}  # seconds, measurements, number of the newest step
        self._steps = 0
        self._last_guessed = False
        self._switch = 0.0  # seconds that a step without guesses takes longer after one with guesses
        self._cost = _FIRST_COST  # of a guess in a shape without a measurement, in a stream's share of a step

    def observe(self, shape: Shape, seconds: float) -> None:
        """Learn from a step."""
        self._steps += 1
        plain = self.without_guesses(shape.streams)
        switched, self._last_guessed = self._last_guessed and not shape.guessing, shape.guessing > 0
        if switched and plain:
            self._switch += _WEIGHT_OF_NEWEST * (min(max(seconds - plain, 0.0), plain) - self._switch)
            return
        average, measured, _ = self._averages.get(shape, (seconds, 0, 0))
        weight = max(1 / (measured + 1), _WEIGHT_OF_NEWEST)
        average += weight * (min(seconds, _SLOWEST * average) - average)
        self._averages[shape] = average, measured + 1, self._steps
        if shape.guessing and plain:
            cost = (average / plain - 1) * shape.streams / (shape.guessing * shape.guesses)
            self._cost += _WEIGHT_OF_NEWEST * (_HOPE * max(cost, 0.0) - self._cost)

    def without_guesses(self, streams: int) -> float | None:
        """Return how long a step without guesses takes, None if there was none."""
        known = self._averages.get(Shape(streams))
        return None if known is None else known[0]

    def with_guesses(self, shape: Shape, plain: float) -> float:
        """Return how long a step takes, or may take; `plain`: the same without guesses."""
        known = self._averages.get(shape)
        if known is None:
            return plain * (1 + shape.guessing * shape.guesses * self._cost / shape.streams)
        seconds, _, newest = known
        return seconds * max(1 - (self._steps - newest) / _FORGET_AFTER, _LEAST_REMEMBERED) + self._switch


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


class Speculation:
    """Chooses the guesses of each step."""

    def __init__(self, most: int, most_in_step: int) -> None:
        """Guess up to `most` tokens of a sequence, and up to `most_in_step` of all."""
        self.times = StepTimes()
        self._counts = [count for count in _COUNTS if count <= most]
        self._most_in_step = most_in_step
        self._rates = HitRates()
        self._ledger = Ledger()

    def observe(self, shape: Shape, seconds: float) -> None:
        """Learn how long a step took."""
        self.times.observe(shape, seconds)
        plain = self.times.without_guesses(shape.streams)
        if not shape.guessing:
            self._ledger.plain_step()
        elif plain:
            self._ledger.guessing_step(self.times.with_guesses(shape, plain) / plain)

    def settle(self, streams: int, accepted: int) -> None:
        """Learn how many guesses of a sequence came true in the last step, which had so many streams."""
        self._ledger.came_true(accepted / streams)

    def guess(self, streams: list[Sequence], room: int) -> dict[int, int]:
        """Write guesses behind the tokens of some streams; return how many by request, the same number for each.

        `room`: tokens that the step and the cache have left for them.
        """
        hopeful = [(sequence, expected) for sequence in streams if (expected := self._expected(sequence))]
        plain = self.times.without_guesses(len(streams)) if hopeful else None
        if plain is None:
            return {}
        affordable = plain * (1 + self._ledger.credit)
        best_rate, best, best_count = _LEAST_GAIN * len(streams) / plain, [], 0
        for count in self._counts:
            able = [(expected[count - 1], sequence) for sequence, expected in hopeful if len(expected) >= count]
            able.sort(key=lambda pair: -pair[0])
            tokens = float(len(streams))
            for guessing, (more, _) in enumerate(able[: min(room, self._most_in_step) // count], 1):
                tokens += more
                seconds = self.times.with_guesses(Shape(len(streams), guessing, count), plain)
                rate = tokens / seconds
                if rate > best_rate and seconds <= affordable:
                    best_rate, best, best_count = rate, [sequence for _, sequence in able[:guessing]], count
        for sequence in best:
            assert sequence.lookup is not None  # noqa: S101 - it was hopeful
            sequence.lookup.write(best_count)
        return {sequence.request: best_count for sequence in best}

    def _expected(self, sequence: Sequence) -> list[float]:
        """Return how many of 1, 2, ... guesses will come true, for as many as the answer has room; [] if none will."""
        if sequence.grammar is not None:
            return []  # the masks of later tokens are not known yet
        lookup = sequence.lookup
        if lookup is None:
            lookup = sequence.lookup = PromptLookup(sequence.tokens, sequence.n_prompt, self._rates)
        lookup.follow(sequence.n_tokens)
        if not lookup.has_guess or not self._counts:
            return []
        most = min(self._counts[-1], len(sequence.tokens) - sequence.n_tokens - 1)
        expected = lookup.expected(most)
        return expected if most > 0 and expected[-1] >= _LEAST_EXPECTED else []
