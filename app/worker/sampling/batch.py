"""Draws the next token of every row of a step's logits.

The order is that of llama.cpp's default chain: mask, logit bias, penalties, DRY, top-k, typical, top-p, min-p, XTC,
temperature, draw. All filters but the last look at the distribution before the temperature. Edits and filters work on
all rows at once; a pass over a whole row is made row by row, so that it stays in the cache.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from app.worker.sampling.chain import survivors, tempered
from app.worker.sampling.edits import edit
from app.worker.sampling.filters import draw
from app.worker.sampling.largest import Candidates, at_least, bounds_for, group_maxima, row_maxima
from app.worker.sampling.sampler import Way
from app.worker.sampling.whole import draw_from_row, narrow_row, row_weights, total_weight

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from app.worker.sampling.edits import Mask
    from app.worker.sampling.sampler import TokenSampler
    from app.worker.sampling.threads import RowThreads

    Floats = npt.NDArray[np.float32]
    Doubles = npt.NDArray[np.float64]
    Ids = npt.NDArray[np.intp]
    Tokens = npt.NDArray[np.int32]

NO_TOKEN = -1  # what `sample` returns for a row without a finite logit at its top
_FIRST_TRY = 64  # most top-p sets are smaller
_OWN_WEIGHT = np.full(1, np.nan)


def sample(
    logits: Floats,
    samplers: Sequence[TokenSampler],
    histories: Sequence[Tokens],
    masks: Sequence[Mask | None] | None = None,
    threads: RowThreads | None = None,
) -> list[int]:
    """Draw one token a row; NO_TOKEN where the row holds NaN or nothing finite.

    `logits`, shape (rows, vocabulary), is edited in place. `histories` are the sequences' tokens so far, `masks` what a
    grammar allows (see `apply_mask`).
    """
    if masks is not None or any(sampler.edits for sampler in samplers):
        edit(logits, samplers, histories, masks)
    tokens = [NO_TOKEN] * len(samplers)

    def draw_rows(rows: Sequence[int]) -> None:
        for row, token in _drawn(logits, samplers, rows):
            tokens[row] = token

    by_way = sorted(range(len(samplers)), key=[sampler.way for sampler in samplers].__getitem__)
    if threads is None:
        draw_rows(by_way)
    else:
        threads.share(draw_rows, by_way, logits.size)
    return tokens


def distribution(logits: Floats, sampler: TokenSampler) -> tuple[Ids, Floats]:
    """Return the tokens that one row of edited logits, shape (1, vocabulary), leaves possible, and their probabilities.

    Takes from the sampler's random stream what XTC takes, and may change the row as XTC does.
    """
    if sampler.way is Way.GREEDY:
        return logits.argmax(axis=1), np.ones(1, np.float32)
    ((_, candidates, totals),) = _narrowed(logits, [sampler], [0])
    if candidates is None:
        narrow_row(logits[0], sampler)
        if not sampler.temperature > 0:
            return logits.argmax(axis=1), np.ones(1, np.float32)
        ids = np.arange(logits.shape[1])
        weights = row_weights(logits[0], logits[0].max(), np.float32(sampler.temperature))
    else:
        ids = candidates.ids[0]
        weights = tempered(candidates.logits, survivors(candidates.logits, [sampler], totals), [sampler])[0]
    possible = weights > 0
    return ids[possible], weights[possible] / weights.sum(dtype=np.float64)


def _drawn(logits: Floats, samplers: Sequence[TokenSampler], rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (row, token) for the rows that have one."""
    others = []
    for row in rows:
        if samplers[row].way is not Way.GREEDY:
            others.append(row)
        elif math.isfinite(logits[row, best := int(logits[row].argmax())]):  # of a row with NaN: the NaN
            yield row, best
    if not others:
        return
    for own, candidates, totals in _narrowed(logits, samplers, others):
        some = [samplers[row] for row in own]
        if candidates is not None:
            weights = tempered(candidates.logits, survivors(candidates.logits, some, totals), some)
            columns = draw(weights, np.array([[sampler.fraction()] for sampler in some]))
            yield from zip(own, candidates.ids[np.arange(len(own)), columns].tolist(), strict=True)
        else:
            narrow_row(logits[own[0]], some[0])
            yield own[0], draw_from_row(logits[own[0]], some[0])


def _narrowed(
    logits: Floats, samplers: Sequence[TokenSampler], rows: Sequence[int]
) -> Iterator[tuple[list[int], Candidates | None, Doubles]]:
    """Yield rows with all their tokens that the filters may leave; one row with None when all tokens must be looked at.

    With them come the weights that top-p takes shares of, NaN where they are the candidates' own. Rows with NaN or
    without a finite logit are left out.
    """
    few = [row for row in rows if samplers[row].way is Way.CANDIDATES]
    for row in rows:
        if samplers[row].way is not Way.CANDIDATES and np.isfinite(logits[row].max()):
            yield [row], None, _OWN_WEIGHT
    if not few:
        return
    maxima = group_maxima(logits, few)
    bests = row_maxima(logits, few, maxima)
    if not (finite := np.isfinite(bests)).all():
        few = [row for row, has_number in zip(few, finite.tolist(), strict=True) if has_number]
        maxima, bests = maxima[finite], bests[finite]
    if not few:
        return
    own = [samplers[row] for row in few]
    of_whole_rows = (
        total_weight(logits[row], best) if sampler.top_p < 1 and not sampler.top_k else np.nan
        for row, best, sampler in zip(few, bests, own, strict=True)
    )
    totals = np.fromiter(of_whole_rows, np.float64, len(few))
    for found in at_least(logits, few, maxima, _bounds(logits, few, maxima, bests, own)):
        wanted = totals[found.lines] * np.array([own[line].top_p for line in found.lines.tolist()])
        short = np.exp(found.logits - bests[found.lines, None]).cumsum(axis=1, dtype=np.float64)[:, -1] < wanted
        for line in found.lines[short].tolist():
            yield [few[line]], None, _OWN_WEIGHT
        if not short.all():
            enough = Candidates(*(part[~short] for part in found)) if short.any() else found
            yield [few[line] for line in enough.lines.tolist()], enough, totals[enough.lines]


def _bounds(
    logits: Floats, rows: Sequence[int], maxima: Floats, bests: Floats, samplers: Sequence[TokenSampler]
) -> Floats:
    """Return for each row a bound that every token reaches which its filters leave, or, for top-p, mostly leave."""
    counts = [sampler.top_k or (_FIRST_TRY if sampler.top_p < 1 else 0) for sampler in samplers]
    counted = [line for line, count in enumerate(counts) if count]
    margins = np.array([sampler.min_p_margin for sampler in samplers], np.float32)
    bounds: Floats = bests + margins
    if counted:
        some = maxima if len(counted) == len(rows) else maxima[counted]
        wanted = [counts[line] for line in counted]
        bounds[counted] = bounds_for(logits, [rows[line] for line in counted], some, wanted)
    return bounds
