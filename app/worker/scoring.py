"""Log probabilities of a prompt's own tokens, each from the logits of the token before it, chunk by chunk."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from app.messages import TokenLogprob
from app.worker.sampling.logprobs import raw_logprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from app.worker.sampling.threads import RowThreads
    from app.worker.scheduler import Chunk
    from app.worker.sequence import Sequence as TokenSequence
    from app.worker.token_names import TokenNames

    Logits = npt.NDArray[np.float32]

_ROW_BYTES = 64 * 1024 * 1024  # of logits that one step may bring for this
_LEAST_ROWS = 32


def score_rows(vocabulary_size: int, batch_size: int) -> int:
    """Return how many rows of logits a step may bring for prompts: what bounds their memory."""
    return min(batch_size, max(_LEAST_ROWS, _ROW_BYTES // (4 * vocabulary_size)))


class PromptScore:
    """What is wanted of one prompt: `top` alternatives a token; and how many tokens have had their follower scored."""

    __slots__ = ("done", "top")

    def __init__(self, top: int) -> None:
        self.top = top
        self.done = 0

    def fit(self, start: int, count: int, n_prompt: int, rows: int) -> tuple[int, int]:
        """Return how many of `count` tokens from `start` on fit into so many rows of logits, and the rows they take.

        The prompt's last token needs none: what follows it is drawn. What was computed before, and preempted, neither.
        """
        first, last = max(start, self.done), n_prompt - 1
        wanted = max(0, min(start + count, last) - first)
        if wanted > rows:
            wanted, count = rows, first + rows - start
        return count, wanted


def score_prompts(
    chunks: Sequence[Chunk], logits: Logits, names: TokenNames, threads: RowThreads
) -> tuple[list[tuple[TokenSequence, list[TokenLogprob]]], Logits]:
    """Return the entries of the prompts' tokens that follow the computed ones, and the rows that are drawn from.

    `logits` has shape (rows of the chunks, vocabulary); what is returned of it may be a copy.
    """
    scored: list[tuple[TokenSequence, list[TokenLogprob]]] = []
    drawn_from: list[int] = []
    row = 0
    for chunk in chunks:
        sequence, score = chunk.sequence, chunk.sequence.score
        if chunk.scores and score is not None:
            rows = logits[row : row + chunk.scores]
            details = raw_logprobs(rows, [score.top] * chunk.scores, [False] * chunk.scores, threads)
            first = max(chunk.start, score.done) + 1
            followers = sequence.tokens[first : first + chunk.scores].tolist()
            pairs = zip(followers, details, strict=True)
            scored.append((sequence, [names.logprob(token, detail) for token, detail in pairs if detail is not None]))
            score.done = first + chunk.scores - 1
        rows_of_chunk = chunk.rows
        if sequence.is_full:
            chunk.wants_logits = False  # nothing is to be drawn
        else:
            drawn_from += range(row + chunk.scores, row + rows_of_chunk)
        row += rows_of_chunk
    return scored, logits if len(drawn_from) == row else logits[drawn_from]


def first_token(sequence: TokenSequence, names: TokenNames) -> TokenLogprob:
    """Return the entry of the prompt's first token, which nothing precedes."""
    token = int(sequence.tokens[0])
    return TokenLogprob(token, names.name(token), math.nan)
