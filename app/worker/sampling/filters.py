"""llama.cpp's filters over candidates: matrices of one line a row, largest logit first (see `largest.Candidates`).

Each takes the mask of the candidates that are still kept, shape (rows, width), and returns a smaller one. Sums run from
left to right, so that a row's result does not depend on the width that its neighbours need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Doubles = npt.NDArray[np.float64]
    Mask = npt.NDArray[np.bool_]
    Ids = npt.NDArray[np.intp]


def weights_of(logits: Floats, kept: Mask) -> Floats:
    """Return the kept candidates' probabilities times an unknown factor: the first kept weighs 1, others less."""
    best = np.take_along_axis(logits, kept.argmax(axis=1)[:, None], axis=1)
    return np.exp(np.where(kept, logits - best, np.float32(-np.inf)))


def sums(weights: Floats) -> Doubles:
    """Return the running sums of each row."""
    return weights.cumsum(axis=1, dtype=np.float64)


def top_p(weights: Floats, kept: Mask, shares: Doubles, totals: Doubles) -> Mask:
    """Keep the fewest of the best that weigh `shares` of `totals` together, at least one; both shape (rows, 1)."""
    running = sums(weights)
    before = np.zeros_like(running)
    before[:, 1:] = running[:, :-1]
    smaller: Mask = kept & ((before < shares * totals) | (before == 0))
    return smaller


def min_p(logits: Floats, kept: Mask, margins: Floats) -> Mask:
    """Keep what is at least so probable as the best kept, less `margins` of the logarithm; shape (rows, 1)."""
    best = np.take_along_axis(logits, kept.argmax(axis=1)[:, None], axis=1)
    return kept & (logits >= best + margins)


def typical(weights: Floats, kept: Mask, shares: Doubles) -> Mask:
    """Keep those whose information is nearest to the entropy, until they weigh more than `shares`; shape (rows, 1)."""
    probabilities = weights / sums(weights)[:, -1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        information = -np.log(probabilities)
        parts = np.where(probabilities > 0, probabilities * information, 0)
    entropies = sums(parts)[:, -1:]
    distances = np.where(kept, np.abs(information - entropies), np.inf)
    order = distances.argsort(axis=1, kind="stable")
    running = np.take_along_axis(probabilities, order, axis=1).cumsum(axis=1)
    chosen = np.zeros_like(kept)
    np.put_along_axis(chosen, order, np.arange(kept.shape[1]) <= (running <= shares).sum(axis=1)[:, None], axis=1)
    return chosen & kept


def xtc(weights: Floats, kept: Mask, thresholds: Doubles) -> Mask:
    """Drop the best but for the last one that reaches the threshold; where none but one does, nothing; (rows, 1)."""
    reach = kept & (weights >= thresholds * sums(weights)[:, -1:])
    number = reach.cumsum(axis=1)
    return kept & ~(reach & (number < number[:, -1:]))


def tempered(logits: Floats, kept: Mask, temperatures: Floats) -> Floats:
    """Return the kept candidates' weights at the temperatures, shape (rows, 1), all above 0."""
    best = np.take_along_axis(logits, kept.argmax(axis=1)[:, None], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        exponents = logits / temperatures - best / temperatures  # rounded as llama.cpp rounds
        huge = ~np.isfinite(best / temperatures)
        exponents = np.where(huge, (logits - best) / temperatures, exponents) if huge.any() else exponents
    return np.exp(np.where(kept, exponents, np.float32(-np.inf)))


def draw(weights: Floats, fractions: Doubles) -> Ids:
    """Return the column of each row's drawn candidate, shape (rows,).

    `fractions`, shape (rows, 1), in [0, 1), choose places in the cumulative distributions.
    """
    running = sums(weights)
    columns = (running <= fractions * running[:, -1:]).sum(axis=1)
    last = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(axis=1)
    drawn: Ids = np.minimum(columns, last)
    return drawn
