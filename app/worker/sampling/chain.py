"""The filters in llama.cpp's order, over candidates of several rows: matrices of one line a row (see `largest`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from app.worker.sampling import filters

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from app.worker.sampling.sampler import TokenSampler

    Floats = npt.NDArray[np.float32]
    Doubles = npt.NDArray[np.float64]
    Kept = npt.NDArray[np.bool_]


def survivors(logits: Floats, samplers: Sequence[TokenSampler], totals: Doubles) -> Kept:
    """Return which candidates the filters leave, shape (rows, width).

    `totals`, shape (rows,), are the weights of whole rows, relative to their best token, for top-p to take a share of;
    NaN: of what the filters before it have left. Takes from the samplers' random streams what XTC takes.
    """
    kept = np.isfinite(logits)
    width = logits.shape[1]
    if any(0 < sampler.top_k < width for sampler in samplers):
        kept &= np.arange(width) < np.array([sampler.top_k or width for sampler in samplers])[:, None]

    if lines := [line for line, sampler in enumerate(samplers) if sampler.top_k and sampler.typical_p < 1]:
        shares = np.array([samplers[line].typical_p for line in lines])[:, None]
        kept[lines] = filters.typical(filters.weights_of(logits[lines], kept[lines]), kept[lines], shares)
    if lines := [line for line, sampler in enumerate(samplers) if sampler.top_p < 1]:
        shares = np.array([samplers[line].top_p for line in lines])[:, None]
        weights = filters.weights_of(logits[lines], kept[lines])
        whole = totals[lines][:, None]
        whole = np.where(np.isnan(whole), filters.sums(weights)[:, -1:], whole)
        kept[lines] = filters.top_p(weights, kept[lines], shares, whole)
    if any(sampler.min_p_margin > -math.inf for sampler in samplers):
        kept = filters.min_p(logits, kept, np.array([s.min_p_margin for s in samplers], np.float32)[:, None])
    if lines := [line for line, sampler in enumerate(samplers) if sampler.xtc_strikes()]:
        thresholds = np.array([samplers[line].xtc_threshold for line in lines])[:, None]
        kept[lines] = filters.xtc(filters.weights_of(logits[lines], kept[lines]), kept[lines], thresholds)
    return kept


def tempered(logits: Floats, kept: Kept, samplers: Sequence[TokenSampler]) -> Floats:
    """Return the weights of what is kept at the samplers' temperatures; at temperature 0 only the best has one."""
    temperatures = np.array([sampler.temperature for sampler in samplers], np.float32)[:, None]
    if (temperatures > 0).all():
        return filters.tempered(logits, kept, temperatures)
    weights = filters.tempered(logits, kept, np.where(temperatures > 0, temperatures, np.float32(1)))
    is_best = np.arange(logits.shape[1]) == kept.argmax(axis=1)[:, None]
    return np.where((temperatures > 0) | is_best, weights, np.float32(0))
