"""From a step's logits to tokens: masks of grammars, log probabilities, draws, and what comes out of guesses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from app.llama.device import thread_count
from app.worker.sampling.batch import sample
from app.worker.sampling.logprobs import RowLogprobs, raw_logprobs
from app.worker.sampling.threads import RowThreads
from app.worker.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from app.worker.grammar import Grammars
    from app.worker.scheduler import Chunk, Schedule
    from app.worker.sequence import Sequence

    Logits = npt.NDArray[np.float32]


class Drawn(NamedTuple):
    """A token that a sequence has drawn."""

    sequence: Sequence
    token: int
    logprobs: RowLogprobs | None


class Drawing:
    """Draws for all rows of a step at once. Belongs to the engine's thread."""

    def __init__(self, grammars: Grammars, settle: Callable[[Chunk, int], None]) -> None:
        """Draw under these grammars. `settle` is told how many of a chunk's guesses came true."""
        self._grammars = grammars
        self._settle = settle
        self.threads = RowThreads(thread_count(0))

    def draw(self, schedule: Schedule, rows: list[Sequence], logits: Logits) -> list[Drawn]:
        """Return what the sequences of `rows` draw, each once; then what some of them draw after guesses, in order.

        `logits`, shape (rows and guesses, vocabulary), is edited in place; it must outlive what is returned.
        """
        verification = Verification(schedule.chunks, logits) if schedule.guesses and rows else None
        if verification is not None:
            logits = verification.known
        rows, logits = self._grammars.ready_rows(rows, logits, idle=not schedule.chunks)
        samplers, threads = [sequence.sampler for sequence in rows], self.threads
        details = raw_logprobs(logits, [s.top_logprobs for s in rows], [s.edits for s in samplers], threads)
        tokens = sample(logits, samplers, [s.tokens[: s.n_tokens] for s in rows], self._grammars.masks(rows), threads)
        drawn = list(map(Drawn, rows, tokens, details))
        if verification is not None:
            for chunk, further in verification.draw(rows, tokens, threads):
                self._settle(chunk, len(further))
                drawn += [Drawn(chunk.sequence, token, detail) for token, detail in further]
        return drawn
