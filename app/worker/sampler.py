"""Draws the next token of every row of a step's logits, in numpy, with the filters of llama.cpp's default chain.

The order is llama.cpp's: logit bias, penalties, top-k, top-p, min-p, temperature, draw. Top-p and min-p look at the
distribution before the temperature. A whole vocabulary is never sorted: the k-th largest of the maxima of blocks is a
lower bound for the k-th largest logit, and only what lies above it is.
"""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from app.messages import Sampling

    Ids = npt.NDArray[np.intp]
    Floats = npt.NDArray[np.float32]
    Tokens = npt.NDArray[np.int32]

_BLOCK = 192
_FIRST_TRY = 64  # most top-p sets are smaller
_SEEDS = 2**64
_LEAST_FINITE = np.finfo(np.float32).min
NO_TOKEN = -1  # what `sample` returns for a row without a finite logit at its top


class RowLogprobs(NamedTuple):
    """A row's log-softmax where it is of interest: its normaliser, and the best tokens, best first."""

    log_sum: float
    top: list[tuple[int, float]]


class TokenSampler:
    """One sequence's way of drawing, with its own random stream: what else is in a batch changes nothing."""

    def __init__(self, sampling: Sampling, vocabulary_size: int, forbidden: Tokens | None = None) -> None:
        """Draw as `sampling` says; never the `forbidden` tokens (as the ends of generation under ignore_eos)."""
        self.greedy = not np.float32(sampling.temperature) > 0  # also when too small for a float32
        self.top_k = sampling.top_k if 0 < sampling.top_k < vocabulary_size else 0
        self._temperature = np.float32(sampling.temperature)
        self._top_p = sampling.top_p if sampling.top_p < 1 else None
        self.needs_largest = bool(self.top_k) or self._top_p is not None
        self._min_p_margin = math.log(sampling.min_p) if sampling.min_p > 0 else None
        self._repeat = np.float32(sampling.repeat_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        no_penalty = sampling.repeat_penalty == 1 and not sampling.frequency_penalty and not sampling.presence_penalty
        self._penalty_window = 0 if no_penalty else sampling.repeat_last_n
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), np.intp)
        self._biases = np.fromiter(sampling.logit_bias.values(), np.float32)
        self._forbidden = forbidden
        self.edits = bool(self._penalty_window or len(self._bias_ids) or forbidden is not None)
        self._random = None if self.greedy else np.random.Generator(np.random.PCG64(_seed(sampling.seed)))

    def edit(self, row: Floats, history: Tokens) -> None:
        """Apply bias and penalties to the logits in place. `history`: the tokens so far, prompt included."""
        if self._forbidden is not None:
            row[self._forbidden] = -np.inf
        if len(self._bias_ids):
            row[self._bias_ids] += self._biases
        if self._penalty_window:
            window = history if self._penalty_window < 0 else history[-self._penalty_window :]
            ids, counts = np.unique(window, return_counts=True)
            logits = row[ids]
            logits = np.where(logits <= 0, logits * self._repeat, logits / self._repeat)
            row[ids] = logits - (counts.astype(np.float32) * self._frequency + self._presence)

    def draw(self, row: Floats, maximum: np.float32, block_maxima: Floats) -> int:
        """Draw a token from edited logits, whose maximum and block maxima are known."""
        if self._random is None:
            return int(row.argmax())
        if not self.top_k and self._top_p is None and self._min_p_margin is None:
            return _draw_from_row(row, maximum, self._temperature, self._random.random())
        ids, weights = self._candidates(row, maximum, block_maxima)
        cumulative = weights.cumsum()
        return int(ids[min(cumulative.searchsorted(self._random.random() * cumulative[-1], "right"), len(ids) - 1)])

    def distribution(self, row: Floats) -> tuple[Ids, Floats]:
        """Return the tokens that edited logits leave possible, with their probabilities."""
        if self.greedy:
            return np.array([row.argmax()]), np.ones(1, np.float32)
        ids, weights = self._candidates(row, row.max(), block_maxima_of(row[None])[0])
        return ids, weights / weights.sum(dtype=np.float64)

    def _candidates(self, row: Floats, maximum: np.float32, block_maxima: Floats) -> tuple[Ids, Floats]:
        if self.top_k:
            ids = largest(row, self.top_k, block_maxima)
            logits = row[ids]
        else:
            ids, logits = self._nucleus(row, maximum, block_maxima)
        if self._top_p is not None and self.top_k:
            weights = np.exp(logits - maximum)
            kept = _nucleus_size(weights.cumsum(), self._top_p * weights.sum())
            ids, logits = ids[:kept], logits[:kept]
        if self._min_p_margin is not None:
            kept_mask = logits >= maximum + np.float32(self._min_p_margin)
            ids, logits = ids[kept_mask], logits[kept_mask]
        return ids, np.exp((logits - maximum) / self._temperature)

    def _nucleus(self, row: Floats, maximum: np.float32, block_maxima: Floats) -> tuple[Ids, Floats]:
        """Return the top-p set of a whole row; everything above min-p when there is no top-p."""
        if self._top_p is None:
            if self._min_p_margin is None:
                return np.arange(len(row)), row
            ids = np.flatnonzero(row >= maximum + np.float32(self._min_p_margin))
            return ids, row[ids]
        weights = np.exp(row - maximum)
        total = weights.sum()
        wanted = self._top_p * total
        ids = largest(row, min(_FIRST_TRY, len(row)), block_maxima)
        if weights[ids].sum() < wanted:
            # All tokens below this bound together weigh less than 1 - top_p: none of them can be needed.
            ids = np.flatnonzero(weights >= (1 - self._top_p) / len(row) * total)
            ids = ids[np.argsort(-row[ids], kind="stable")]
        ids = ids[: _nucleus_size(weights[ids].cumsum(), wanted)]
        return ids, row[ids]


def sample(logits: Floats, samplers: Sequence[TokenSampler], histories: Sequence[Tokens]) -> list[int]:
    """Draw one token a row; NO_TOKEN where the row holds NaN or nothing finite.

    `logits`, shape (rows, vocabulary), is edited in place by bias and penalties.
    """
    for row, sampler, history in zip(logits, samplers, histories, strict=True):
        if sampler.edits:
            sampler.edit(row, history)
    best = logits.argmax(axis=1)  # of a row with NaN: the NaN
    maxima = logits[np.arange(len(best)), best]
    tokens: list[int] = best.tolist()
    drawing = [index for index, sampler in enumerate(samplers) if not sampler.greedy]
    if drawing:
        sorting = [index for index in drawing if samplers[index].needs_largest]
        blocks = dict(zip(sorting, block_maxima_of(logits, sorting), strict=True)) if sorting else {}
        for index in drawing:
            if np.isfinite(maxima[index]):
                tokens[index] = samplers[index].draw(logits[index], maxima[index], blocks.get(index, maxima[:0]))
    if not np.isfinite(maxima).all():
        for index in np.flatnonzero(~np.isfinite(maxima)).tolist():
            tokens[index] = NO_TOKEN
    return tokens


def logprobs(row: Floats, top: int) -> RowLogprobs:
    """Return the log-softmax of raw logits: the normaliser (subtract it from a logit) and the `top` best tokens."""
    maximum = row.max()
    log_sum = float(maximum) + math.log(float(np.exp(row - maximum).sum(dtype=np.float64)))
    if not top:
        return RowLogprobs(log_sum, [])
    ids = largest(row, min(top, len(row)), block_maxima_of(row[None])[0])
    return RowLogprobs(log_sum, [(token, float(row[token]) - log_sum) for token in ids.tolist()])


def block_maxima_of(logits: Floats, rows: Sequence[int] | None = None) -> Floats:
    """Return the maxima of blocks of a row's logits, shape (rows, blocks); what fills no block is left out."""
    if rows is not None and len(rows) < len(logits):
        logits = logits[list(rows)]
    whole = logits.shape[1] // _BLOCK * _BLOCK
    maxima: Floats = logits[:, :whole].reshape(len(logits), -1, _BLOCK).max(axis=2)
    return maxima


def largest(row: Floats, count: int, block_maxima: Floats) -> Ids:
    """Return the ids of the `count` largest logits, largest first; of equal ones, the smaller id first.

    Fewer where a grammar leaves fewer: logits of -inf are never among them.
    """
    if count <= len(block_maxima):
        bound = np.partition(block_maxima, len(block_maxima) - count)[len(block_maxima) - count]
    else:
        bound = np.partition(row, len(row) - count)[len(row) - count]
    ids = np.flatnonzero(row >= max(bound, _LEAST_FINITE))
    return ids[np.argsort(-row[ids], kind="stable")[:count]]


def _nucleus_size(cumulative: Floats, wanted: float) -> int:
    return min(int(cumulative.searchsorted(wanted, "left")) + 1, len(cumulative))


def _draw_from_row(row: Floats, maximum: np.float32, temperature: np.float32, fraction: float) -> int:
    """Invert the cumulative distribution of a whole row: first among blocks, then inside one."""
    weights = row - maximum
    weights /= temperature
    np.exp(weights, out=weights)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    cumulative = sums.cumsum()
    target = fraction * cumulative[-1]
    block = min(int(cumulative.searchsorted(target, "right")), len(sums) - 1)
    start = block * _BLOCK
    inside = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
    rest = target - (cumulative[block - 1] if block else 0.0)
    offset = min(int(inside.searchsorted(rest, "right")), len(inside) - 1)
    return start + offset


def _seed(seed: int | None) -> int:
    return secrets.randbits(64) if seed is None else seed % _SEEDS
