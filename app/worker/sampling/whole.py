"""What needs passes over a whole row: its weight, filters that keep very many tokens or look at all, draws from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.worker.sampling.sampler import TokenSampler

    Floats = npt.NDArray[np.float32]

_SEGMENTS = 64  # of a row, whose weights are summed first
_BINS = 8192
_BINS_PER_NAT = 256
_LEAST_LOGPROB = np.float32(-1e30)


def total_weight(row: Floats, maximum: np.float32) -> float:
    """Return the sum of the tokens' weights, where the most probable weighs 1."""
    weights = row - maximum
    np.exp(weights, out=weights)
    return float(weights.sum())


def narrow_row(row: Floats, sampler: TokenSampler) -> None:
    """Apply all filters but top-k to a whole row with a finite maximum: make impossible, in place, what they drop."""
    if sampler.typical_p < 1:
        _keep_typical(row, sampler.typical_p)
    if sampler.top_p < 1:
        weights = np.exp(row - row.max())
        kept = _heaviest(row, weights, sampler.top_p * float(weights.sum()), "left")
        row[~kept] = -np.inf
    if sampler.min_p_margin > -np.inf:
        row[row < row.max() + np.float32(sampler.min_p_margin)] = -np.inf
    if sampler.xtc_strikes():
        exclude_top_choices(row, row.max(), sampler.xtc_threshold)


def _keep_typical(row: Floats, share: float) -> None:
    """Keep those whose information is nearest to the entropy, until they weigh more than the share."""
    maximum = row.max()
    logprobs = row - (maximum + np.log(np.float32(total_weight(row, maximum))))
    probabilities = np.exp(logprobs)
    np.maximum(logprobs, _LEAST_LOGPROB, out=logprobs)  # of what is impossible: 0 times infinity is no number
    nearness = -np.abs(logprobs - np.dot(probabilities, logprobs))
    row[~_heaviest(nearness, probabilities, share, "right")] = -np.inf


def _heaviest(values: Floats, weights: Floats, wanted: float, side: Literal["left", "right"]) -> npt.NDArray[np.bool_]:
    """Return the mask of the fewest greatest values that weigh `wanted` together ("right": more than that).

    Of equal values the first count first. Only the values of one of many narrow bins need sorting.
    """
    steps = (values.max() - values) * np.float32(_BINS_PER_NAT)
    bins = np.minimum(steps, np.float32(_BINS - 1)).astype(np.intp)
    running = np.bincount(bins, weights=weights, minlength=_BINS).cumsum()
    last = int(running.searchsorted(wanted, side))
    if last >= _BINS:  # the sums are rounded
        return weights > 0
    kept: npt.NDArray[np.bool_] = bins < last
    inside = np.flatnonzero(bins == last)
    inside = inside[np.argsort(-values[inside], kind="stable")]
    within = weights[inside].cumsum(dtype=np.float64) + (running[last - 1] if last else 0.0)
    kept[inside[: int(within.searchsorted(wanted, side)) + 1]] = True
    return kept


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


def draw_from_row(row: Floats, sampler: TokenSampler) -> int:
    """Draw from all that is possible in a row whose filters are applied."""
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
