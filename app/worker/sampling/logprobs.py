"""Log probabilities of raw logits, for all the rows that want them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from app.worker.sampling.largest import largest
from app.worker.sampling.whole import total_weight

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from app.worker.sampling.threads import RowThreads

    Floats = npt.NDArray[np.float32]

_NONE = np.empty(0, np.intp)


class RowLogprobs(NamedTuple):
    """A row's log-softmax where it is of interest."""

    row: Floats  # the raw logits
    log_sum: float  # subtract it from a logit
    top: list[tuple[int, float]]  # the most probable tokens, best first

    def of(self, token: int) -> float:
        """Return the log probability of one token."""
        return float(self.row[token]) - self.log_sum


def raw_logprobs(
    logits: Floats, tops: Sequence[int | None], edited: Sequence[bool], threads: RowThreads | None = None
) -> list[RowLogprobs | None]:
    """Return the log-softmax of each row of raw logits, shape (rows, vocabulary), with its `tops` best tokens.

    None where `tops` says None. Rows that will be `edited` are copied, others looked at in place.
    """
    details: list[RowLogprobs | None] = [None] * len(tops)
    wanted = [row for row, top in enumerate(tops) if top is not None]
    if not wanted:
        return details

    def look(rows: Sequence[int]) -> None:
        ranking = [row for row in rows if tops[row]]
        ranked = dict(zip(ranking, largest(logits, ranking, [tops[row] or 0 for row in ranking]), strict=True))
        for row in rows:
            values = logits[row]
            maximum = values.max()
            log_sum = float(maximum) + math.log(total_weight(values, maximum)) if np.isfinite(maximum) else math.nan
            ids = ranked.get(row, _NONE)
            top = list(zip(ids.tolist(), (values[ids].astype(np.float64) - log_sum).tolist(), strict=True))
            details[row] = RowLogprobs(values.copy() if edited[row] else values, log_sum, top)

    if threads is None:
        look(wanted)
    else:
        threads.share(look, wanted, len(wanted) * logits.shape[1])
    return details
