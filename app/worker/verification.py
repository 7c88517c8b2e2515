"""Guessed tokens against what is drawn: each place is drawn as if nothing had been guessed, up to the first difference.

So the answer has the distribution that it has without guesses, whatever the sampler remembers of its history.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from app.worker.sampling.batch import sample
from app.worker.sampling.logprobs import RowLogprobs, raw_logprobs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

    from app.messages import Piece, TokenLogprob
    from app.worker.sampling.threads import RowThreads
    from app.worker.scheduler import Chunk
    from app.worker.sequence import Sequence as TokenSequence

    Logits = npt.NDArray[np.float32]
    Further = list[tuple[int, RowLogprobs | None]]


class Verification:
    """The rows of one step with guesses."""

    def __init__(self, chunks: Iterable[Chunk], logits: Logits) -> None:
        """Sort the rows of logits, shape (rows, vocabulary): those of the chunks' known tokens, and of guesses."""
        self._logits = logits
        self._guessing: list[Chunk] = []
        self._rows: dict[TokenSequence, int] = {}  # of the first guess
        known = []
        row = 0
        for chunk in chunks:
            if not chunk.wants_logits:
                continue
            known.append(row)
            if chunk.guesses:
                self._guessing.append(chunk)
                self._rows[chunk.sequence] = row + 1
            row += 1 + chunk.guesses
        self.known: Logits = logits[:1] if len(known) == 1 else logits[known]

    def draw(
        self, sequences: Sequence[TokenSequence], tokens: list[int], threads: RowThreads
    ) -> list[tuple[Chunk, Further]]:
        """Return what is drawn after guesses that came true, for each chunk with guesses: a token for each such guess.

        `tokens` are what the `sequences` have drawn from `known`; nothing is appended to them yet.
        """
        first = dict(zip(sequences, tokens, strict=True))
        drawn: list[Further] = [[] for _ in self._guessing]
        going_on = list(range(len(drawn)))
        depth = 0
        while going_on := [line for line in going_on if self._came_true(line, depth, drawn[line], first)]:
            some = [self._guessing[line].sequence for line in going_on]
            rows = [self._rows[sequence] + depth for sequence in some]
            logits = self._logits[rows[0] : rows[0] + 1] if len(rows) == 1 else self._logits[rows]
            depth += 1
            samplers = [sequence.sampler for sequence in some]
            details = raw_logprobs(logits, [s.top_logprobs for s in some], [s.edits for s in samplers], threads)
            histories = [sequence.tokens[: sequence.n_tokens + depth] for sequence in some]
            next_tokens = sample(logits, samplers, histories, None, threads)
            for line, token, detail in zip(going_on, next_tokens, details, strict=True):
                drawn[line].append((token, detail))
        return list(zip(self._guessing, drawn, strict=True))

    def _came_true(self, line: int, depth: int, drawn: Further, first: dict[TokenSequence, int]) -> bool:
        chunk = self._guessing[line]
        if depth == chunk.guesses:
            return False
        sequence = chunk.sequence
        token = drawn[-1][0] if drawn else first.get(sequence)
        return token == int(sequence.tokens[sequence.n_tokens + depth])


def joined(pieces: list[Piece]) -> list[Piece]:
    """Return one piece for each request, with all of its text and log probabilities."""
    by_request: dict[int, Piece] = {}
    for piece in pieces:
        before = by_request.get(piece.request)
        if before is None:
            by_request[piece.request] = piece
            continue
        by_request[piece.request] = msgspec.structs.replace(
            piece,
            text=before.text + piece.text,
            logprobs=_both(before.logprobs, piece.logprobs),
            prompt_logprobs=_both(before.prompt_logprobs, piece.prompt_logprobs),
        )
    return list(by_request.values())


def _both(first: list[TokenLogprob] | None, then: list[TokenLogprob] | None) -> list[TokenLogprob] | None:
    return None if first is None and then is None else [*(first or ()), *(then or ())]
