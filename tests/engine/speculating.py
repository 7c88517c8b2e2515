"""Speculation that tests can count on, and a comparison of answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.model import Model
from app.messages import Step
from app.worker.sequence import Sequence
from app.worker.speculation import Speculation
from app.worker.step_times import StepTimes
from tests.engine.harness import Harness

SLOTS, CONTEXT, MOST = 3, 1024, 7
NUMBERS = "one two three four five six seven eight nine ten "
REPETITIVE = NUMBERS * 4 + "one two"
ORDINARY = "The history of the city begins with"
# Rows computed together are rounded otherwise than rows computed alone; where two tokens are nearly as probable, either
# may be the best.
NEARLY = 0.2


class FreeGuesses(StepTimes):
    """Says that steps with guesses take no longer."""

    def observe(self, *_: Any, **__: Any) -> None:
        pass

    def without_guesses(self, streams: int) -> float:
        return float(streams)

    def with_guesses(self, *_: Any, **__: Any) -> float:
        return 1.0


class Eager(Speculation):
    """Guesses whenever it can."""

    def __init__(self, most: int = MOST, **more: Any) -> None:
        super().__init__(most, SLOTS * most, **more)
        self.times = FreeGuesses()


class DraftOnly(Eager):
    """Leaves all guesses to the draft model."""

    def __init__(self) -> None:
        super().__init__(draft_cost=0.1)

    def _by_lookup(self, *_: Sequence) -> list[float]:
        return []


def accepted(harness: Harness) -> int:
    return sum(message.load.accepted_tokens for message in harness.sent if isinstance(message, Step))


def generated(harness: Harness) -> int:
    return sum(message.load.tokens_generated for message in harness.sent if isinstance(message, Step))


def compare(model: Model, prompt: str, left: str, right: str) -> None:
    """Fail unless the answers are the same up to a place where two tokens are nearly as probable."""
    if left == right:
        return
    known = model.vocabulary.tokenize(prompt)
    answers = [model.vocabulary.tokenize(text) for text in (left, right)]
    length = min(map(len, answers))
    place = int(np.flatnonzero(answers[0][:length] != answers[1][:length])[0])
    tokens = np.concatenate([known, answers[0][:place]]).astype(np.int32)
    with Context(model, slots=1, context_length=CONTEXT, batch_size=CONTEXT, threads=2) as context:
        batch = Batch(CONTEXT)
        batch.add(0, 0, tokens, wants_logits=True)
        logits = context.decode(batch)[0]
        first, second = (float(logits[answer[place]]) for answer in answers)
    assert abs(first - second) < NEARLY, f"{left!r} is not {right!r}: differs by {first - second} at token {place}"
