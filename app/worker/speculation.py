"""How many guesses a step of the streams computes beside their tokens: as many as pay. Pure.

A step with guesses takes longer and yields more tokens. How long it takes is measured, how many guesses come true is
known from the text (`lookup`), and what promises the most tokens a second is done, as long as the ledger allows it.
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
_LEAST_COST = 1e-3  # of a guess, in a stream's share of a step
_FIRST_CREDIT = 3.0  # steps without guesses
_MOST_CREDIT = 16.0
_PART_TO_RISK = 0.01  # of the time of steps without guesses
_FORGET_AFTER = 2048  # steps: what looked bad is tried again in time
_LEAST_REMEMBERED = 0.5
_MANY = 64  # guesses of all sequences in a step; a row of logits of each is memory


def guesses_in_step(slots: int, most: int) -> int:
    """Return how many guesses a step may hold that gives `slots` sequences up to `most` each."""
    return min(slots * most, max(most, _MANY))


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
        self._guess: dict[
            tuple[int, int], _Average
        ] = {}  # by the lengths in bits of the numbers of streams and guesses
        self._steps = 0
        self._last_guessed = False
        self._switch = 0.0  # what a step without guesses takes longer after one with guesses, as a part of it

    def observe(self, streams: int, guesses: int, seconds: float) -> None:
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
            key = streams.bit_length(), guesses.bit_length()
            cost = max(seconds / plain - 1, _LEAST_COST) * streams / guesses
            self._guess[key] = self._followed(self._guess.get(key, _Average(cost)), cost)

    def without_guesses(self, streams: int) -> float | None:
        """Return how many seconds a step without guesses takes, None if there was none."""
        known = self._plain.get(streams)
        return None if known is None else known.value

    def with_guesses(self, streams: int, guesses: int, token_seconds: float = 0.0) -> float:
        """Return how many times as long as without guesses a step takes, or could take.

        Where none has been measured, a guess is believed to take `token_seconds`.
        """
        known = self._guess.get((streams.bit_length(), guesses.bit_length()))
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


class Speculation:
    """Chooses the guesses of each step."""

    def __init__(self, most: int, most_in_step: int) -> None:
        """Guess up to `most` tokens of a sequence, and up to `most_in_step` of all."""
        self.times = StepTimes()
        self._counts = [count for count in _COUNTS if count <= most]
        self._most_in_step = most_in_step
        self._rates = HitRates()
        self._ledger = Ledger()

    def observe(self, streams: int, guesses: int, seconds: float) -> None:
        """Learn how long a step took that had so many guesses, of all its streams together."""
        self.times.observe(streams, guesses, seconds)
        if guesses:
            self._ledger.guessing_step(self.times.with_guesses(streams, guesses))
        else:
            self._ledger.plain_step()

    def settle(self, streams: int, accepted: int) -> None:
        """Learn how many guesses of a sequence came true in the last step, which had so many streams."""
        self._ledger.came_true(accepted / streams)

    def guess(self, streams: list[Sequence], room: int, token_seconds: float) -> dict[int, int]:
        """Write guesses behind the tokens of some streams; return how many by request, the same number for each.

        `room`: tokens that the step and the cache have left for them. `token_seconds`: what a token of a prompt takes,
        of which a step holds many; a guess can hardly take less.
        """
        hopeful = [(sequence, expected) for sequence in streams if (expected := self._expected(sequence))]
        number = len(streams)
        if not hopeful or self.times.without_guesses(number) is None:
            return {}
        best: list[Sequence] = []
        best_rate, best_count = _LEAST_GAIN * number, 0
        for count in self._counts:
            able = [(expected[count - 1], sequence) for sequence, expected in hopeful if len(expected) >= count]
            able.sort(key=lambda pair: -pair[0])
            tokens = float(number)
            for guessing, (more, _) in enumerate(able[: min(room, self._most_in_step) // count], 1):
                tokens += more
                time = self.times.with_guesses(number, guessing * count, token_seconds)
                if tokens / time > best_rate and time - 1 <= self._ledger.credit:
                    best_rate, best, best_count = tokens / time, [sequence for _, sequence in able[:guessing]], count
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
