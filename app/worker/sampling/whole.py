"""What needs a pass over a whole row: its weight, the locally typical tokens, draws that no filter has narrowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from app.worker.sampling.largest import at_least, bounds_for, group_maxima, ordered

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.worker.sampling.sampler import TokenSampler

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.intp]

_SEGMENTS = 64  # of a row, whose weights are summed first
_FIRST_TRY = 512  # most locally typical sets are smaller
_LEAST_LOGPROB = np.float32(-1e30)


def total_weight(row: Floats, maximum: np.float32) -> float:
    """Return the sum of the tokens' weights, where the most probable weighs 1."""
    weights = row - maximum
    np.exp(weights, out=weights)
    return float(weights.sum())


def typical_tokens(row: Floats, maximum: np.float32, share: float) -> Ids:
    """Return the locally typical tokens of a finite row: those whose information is nearest to the entropy."""
    logprobs = row - (maximum + np.log(np.float32(total_weight(row, maximum))))
    probabilities = np.exp(logprobs)
    np.maximum(logprobs, _LEAST_LOGPROB, out=logprobs)  # of what is impossible: 0 times infinity is no number
    nearness = -np.abs(logprobs - np.dot(probabilities, logprobs))[None]
    maxima = group_maxima(nearness, [0])
    count = _FIRST_TRY
    while count < len(row):
        ((_, ids, _),) = at_least(nearness, [0], maxima, bounds_for(nearness, [0], maxima, [count]))
        running = probabilities[ids[0]].cumsum(dtype=np.float64)
        if running[-1] > share:
            break
        count *= 8
    else:
        ids = ordered(nearness, 0, np.arange(len(row))).ids
        running = probabilities[ids[0]].cumsum(dtype=np.float64)
    return ids[0, : int(running.searchsorted(share, "right")) + 1]


def nucleus_bound(row: Floats, maximum: np.float32, share: float, total: float) -> np.float32:
    """Return the least logit that top-p keeps, of a row whose best tokens are so many that sorting them all pays."""
    # All tokens below this bound together weigh less than 1 - share: none of them can be needed.
    low = maximum + np.log((1 - share) / len(row) * total)
    values = np.sort(row[row >= low])[::-1]
    running = np.exp(values - maximum).cumsum(dtype=np.float64)
    last = (
        int(running.searchsorted(share * total)) + 1
    )  # one more than top-p keeps, for sums that are rounded otherwise
    bound: np.float32 = values[min(last, len(values) - 1)]
    return bound


def exclude_top_choices(row: Floats, maximum: np.float32, threshold: float) -> None:
    """Make impossible, in place, all tokens that reach the threshold but the least probable of them (XTC)."""
    weights = np.exp(row - maximum)
    reach = np.flatnonzero(weights >= threshold * float(weights.sum()))
    if len(reach) > 1:
        last = len(reach) - 1 - int(row[reach][::-1].argmin())
        row[np.delete(reach, last)] = -np.inf


def row_weights(row: Floats, maximum: np.float32, temperature: np.float32) -> Floats:
    """Return the weights of all tokens of a row at a temperature above 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        top = maximum / temperature
        if temperature == 1 or not np.isfinite(top):
            weights = (row - maximum) / temperature
        else:
            weights = row / temperature  # rounded as llama.cpp rounds
            weights -= top
    np.exp(weights, out=weights)
    return weights


def draw_from_row(row: Floats, best: int, sampler: TokenSampler) -> int:
    """Draw from all tokens of a finite row, of which `best` is the most probable."""
    if sampler.xtc_strikes():
        exclude_top_choices(row, row[best], sampler.xtc_threshold)
        best = int(row.argmax())
    fraction = sampler.fraction()
    if not sampler.temperature > 0:
        return best
    return _place(row_weights(row, row[best], np.float32(sampler.temperature)), fraction)


def _place(weights: Floats, fraction: float) -> int:
    """Invert the cumulative distribution: first among segments, then inside one."""
    size = -(-len(weights) // _SEGMENTS)
    whole = len(weights) // size * size
    sums = weights[:whole].reshape(-1, size).sum(axis=1)
    cumulative = np.append(sums, weights[whole:].sum()).cumsum(dtype=np.float64)
    target = fraction * cumulative[-1]
    segment = int(cumulative.searchsorted(target, "right"))
    if segment == len(cumulative):  # rounding, at the very end
        return int(np.flatnonzero(weights)[-1])
    start = segment * size
    inside = weights[start : start + size].cumsum(dtype=np.float64)
    rest = target - (cumulative[segment - 1] if segment else 0.0)
    offset = int(inside.searchsorted(rest, "right"))
    return start + (offset if offset < len(inside) else int(np.flatnonzero(weights[start : start + size])[-1]))
