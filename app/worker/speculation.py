"""How many guesses a step of the streams computes beside their tokens: as many as pay. Pure.

A step with guesses takes longer and yields more tokens. How long it takes is measured, how many guesses come true is
known from the text (`lookup`) or from the draft model's earlier guesses, and what promises the most tokens a second is
done, as long as the ledger allows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from app.worker.draft_rate import DraftRate
from app.worker.lookup import HitRates, PromptLookup
from app.worker.step_times import Ledger, StepTimes

if TYPE_CHECKING:
    from app.worker.sequence import Sequence
    from app.worker.step_times import Source

    _Hope = tuple[Sequence, list[float]]  # how many of 1, 2, ... guesses come true

_COUNTS = (1, 3, 7, 15, 31)  # guesses of one sequence: with its own token, kernels for many rows are filled
_LEAST_GAIN = 1.05  # times the tokens a second that a step with guesses must promise
_LEAST_GAIN_OF_MANY = 1.5  # of several streams: those that get ahead leave the others to steps that are less full
_MOST_STREAMS = 2  # of more, guesses and looking for them took a twentieth from eight streams on two cores
_LEAST_EXPECTED = 0.25  # guesses that come true; less is not worth looking at
_MANY = 64  # guesses of all sequences in a step; a row of logits of each is memory


def guesses_in_step(slots: int, most: int) -> int:
    """Return how many guesses a step may hold that gives `slots` sequences up to `most` each."""
    return min(slots * most, max(most, _MANY))


class _Choice(NamedTuple):
    gain: float  # times the tokens a second
    sequences: list[Sequence]
    each: int  # guesses
    source: Source


class Speculation:
    """Chooses the guesses of each step."""

    def __init__(self, most: int, most_in_step: int, *, draft_cost: float | None = None) -> None:
        """Guess up to `most` tokens of a sequence, and up to `most_in_step` of all.

        `draft_cost`: what a token of the draft model takes, in parts of the model's; None: there is no draft model.
        """
        self.times = StepTimes()
        self._counts = [count for count in _COUNTS if count <= most]
        self._most_in_step = most_in_step
        self._draft_cost = draft_cost
        self._rates = HitRates()
        self._draft_rate = DraftRate()
        self._ledger = Ledger()
        self.source: Source = "lookup"  # of the last guesses

    def observe(self, streams: int, guesses: int, seconds: float) -> None:
        """Learn how long a step took that had so many guesses, of all its streams together."""
        self.times.observe(streams, guesses, seconds, self.source)
        if guesses:
            self._ledger.guessing_step(self.times.with_guesses(streams, guesses, source=self.source))
        else:
            self._ledger.plain_step()

    def settle(self, sequence: Sequence, streams: int, guesses: int, accepted: int) -> None:
        """Learn how many guesses of a sequence came true in the last step, which had so many streams."""
        self._ledger.came_true(accepted / streams)
        if self.source == "draft" and sequence.draft_rate is not None:
            sequence.draft_rate.observe(guesses, accepted)

    def guess(self, streams: list[Sequence], room: int, token_seconds: float) -> dict[int, int]:
        """Choose who guesses; return how many by request, the same number for each.

        Guesses by lookup are written behind the known tokens; when `source` is the draft model, the caller has it do
        that. `room`: tokens that the step and the cache have left. `token_seconds`: what a token of a prompt takes, of
        which a step holds many; a guess can hardly take less.
        """
        if len(streams) > _MOST_STREAMS:
            return {}
        # under a grammar, later masks are not known yet
        free = [sequence for sequence in streams if sequence.grammar is None and sequence.score is None]
        by_lookup = [(sequence, expected) for sequence in free if (expected := self._by_lookup(sequence))]
        drafted = [] if self._draft_cost is None else [(sequence, self._by_draft(sequence)) for sequence in free]
        if not (by_lookup or drafted) or self.times.without_guesses(len(streams)) is None:
            return {}
        best = _Choice(_LEAST_GAIN if len(streams) == 1 else _LEAST_GAIN_OF_MANY, [], 0, "lookup")
        room = min(room, self._most_in_step)
        if by_lookup:
            best = self._better(best, len(streams), by_lookup, room, token_seconds, "lookup")
        if drafted:
            best = self._better(best, len(streams), drafted, room, token_seconds, "draft")
        self.source = best.source
        for sequence in best.sequences:
            if best.source == "lookup" and sequence.lookup is not None:
                sequence.lookup.write(best.each)
        return {sequence.request: best.each for sequence in best.sequences}

    def _better(
        self, best: _Choice, streams: int, hopeful: list[_Hope], room: int, token_seconds: float, source: Source
    ) -> _Choice:
        """Return what promises more tokens in the time of a step without guesses, `best` or guesses of this source."""
        drafting = self._draft_cost if source == "draft" and self._draft_cost is not None else 0.0
        plain = self.times.without_guesses(streams) or 0.0
        for count in self._counts:
            able = [(expected[count - 1], sequence) for sequence, expected in hopeful if len(expected) >= count]
            able.sort(key=lambda pair: -pair[0])
            tokens = float(streams)
            for guessing, (more, _) in enumerate(able[: room // count], 1):
                tokens += more
                seconds = token_seconds + drafting * plain / guessing
                time = self.times.with_guesses(streams, guessing * count, seconds, source)
                gain = tokens / streams / time
                if gain > best.gain and time - 1 <= self._ledger.credit:
                    best = _Choice(gain, [sequence for _, sequence in able[:guessing]], count, source)
        return best

    def _by_lookup(self, sequence: Sequence) -> list[float]:
        """Return how many of 1, 2, ... guesses will come true, for as many as the answer has room; [] if none will."""
        lookup = sequence.lookup
        if lookup is None:
            lookup = sequence.lookup = PromptLookup(sequence.tokens, sequence.n_prompt, self._rates)
        lookup.follow(sequence.n_tokens)
        if not lookup.has_guess:
            return []
        expected = lookup.expected(self._room(sequence))
        return expected if expected and expected[-1] >= _LEAST_EXPECTED else []

    def _by_draft(self, sequence: Sequence) -> list[float]:
        if sequence.draft_rate is None:
            sequence.draft_rate = DraftRate(self._draft_rate)
        return sequence.draft_rate.expected(self._room(sequence))

    def _room(self, sequence: Sequence) -> int:
        return min(self._counts[-1], len(sequence.tokens) - sequence.n_tokens - 1)
