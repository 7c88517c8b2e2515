"""The largest logits of many rows without sorting a vocabulary.

A row is seen as groups of 64 logits that lie a stride apart, because numpy takes the maxima of such groups at the speed
of memory. The k-th largest of these maxima is a lower bound for the k-th largest logit, and only groups that reach a
bound are looked into. Every result depends on its own row alone, never on what else is in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.intp]

_GROUP = 64
_NARROW = 1024  # candidates; rows with more get a matrix of their own, so that they don't widen the others'
_LEAST = np.finfo(np.float32).min  # minus infinity is no candidate
_SIGN = np.uint32(1 << 31)
_NOTHING = np.uint64(2**64 - 1)
_LOW_HALF = np.uint64(2**32 - 1)
_HALF = np.uint64(32)


class Candidates(NamedTuple):
    """Some tokens of some rows, in matrices of one line a row: largest logit first, of equal ones the smaller id."""

    lines: Ids  # shape (n,): which of the rows that were asked for
    ids: Ids  # shape (n, width)
    logits: Floats  # shape (n, width), minus infinity beyond the row's own


def group_maxima(logits: Floats, rows: Sequence[int]) -> Floats:
    """Return the maxima of each row's groups, shape (len(rows), groups). What fills no group is left out."""
    grouped = _grouped(logits)
    maxima = np.empty((len(rows), grouped.shape[2]), np.float32)
    for line, row in enumerate(rows):
        np.max(grouped[row], axis=0, out=maxima[line])
    return maxima


def row_maxima(logits: Floats, rows: Sequence[int], maxima: Floats) -> Floats:
    """Return each row's maximum from its groups' maxima, shape (len(rows),); NaN where a row holds NaN."""
    best: Floats = maxima.max(axis=1, initial=-np.inf)
    rest = logits[:, _GROUP * maxima.shape[1] :]
    return np.maximum(best, rest[rows].max(axis=1)) if rest.shape[1] else best


def bounds_for(logits: Floats, rows: Sequence[int], maxima: Floats, counts: Sequence[int]) -> Floats:
    """Return, for each row, a bound that at least `counts` logits reach, and hardly more; shape (len(rows),)."""
    bounds = np.empty(len(rows), np.float32)
    size, groups = logits.shape[1], maxima.shape[1]
    wanted = np.array(counts)
    for count in set(counts):
        lines = np.flatnonzero(wanted == count)
        if count <= groups:
            some = maxima if len(lines) == len(rows) else maxima[lines]
            bounds[lines] = np.partition(some, groups - count, axis=1)[:, groups - count]
        else:
            rank = max(size - count, 0)
            bounds[lines] = [np.partition(logits[rows[line]], rank)[rank] for line in lines.tolist()]
    return bounds


def at_least(logits: Floats, rows: Sequence[int], maxima: Floats, bounds: Floats) -> Iterator[Candidates]:
    """Yield all finite logits of each row that reach its bound: one matrix, and one more for each row with very many.

    A row without any is in none of them.
    """
    lines, ids = _found(logits, np.asarray(rows, np.intp), maxima, np.maximum(bounds, _LEAST))
    counts = np.bincount(lines, minlength=len(rows))
    wide = np.flatnonzero(counts > _NARROW)
    row_numbers = np.asarray(rows, np.intp)
    if len(wide):
        is_wide = counts[lines] > _NARROW
        for line in wide:
            own = ids[lines == line]
            yield _matrix(logits, row_numbers, np.full(len(own), line), own)
        lines, ids = lines[~is_wide], ids[~is_wide]
    if len(lines):
        yield _matrix(logits, row_numbers, lines, ids)


def largest(logits: Floats, rows: Sequence[int], counts: Sequence[int]) -> list[Ids]:
    """Return the ids of each row's `counts` largest finite logits, largest first; of equal ones the smaller id."""
    if not rows:
        return []
    maxima = group_maxima(logits, rows)
    found: list[Ids] = [np.empty(0, np.intp)] * len(rows)
    for some in at_least(logits, rows, maxima, bounds_for(logits, rows, maxima, counts)):
        kept = np.isfinite(some.logits).sum(axis=1)
        for line, ids, known in zip(some.lines.tolist(), some.ids, kept.tolist(), strict=True):
            found[line] = ids[: min(known, counts[line])]
    return found


def _grouped(logits: Floats) -> npt.NDArray[np.float32]:
    """View the rows as shape (rows, _GROUP, groups): a group is a column."""
    groups = logits.shape[1] // _GROUP
    return logits[:, : groups * _GROUP].reshape(len(logits), _GROUP, groups)


def _found(logits: Floats, rows: Ids, maxima: Floats, bounds: Floats) -> tuple[Ids, Ids]:
    """Return lines (ascending) and ids of all logits that reach their line's bound."""
    groups = maxima.shape[1]
    lines, columns = np.nonzero(maxima >= bounds[:, None])
    members = _grouped(logits)[rows[lines], :, columns]
    pairs, places = np.nonzero(members >= bounds[lines][:, None])
    lines, ids = lines[pairs], columns[pairs] + places * groups
    if logits.shape[1] > groups * _GROUP:
        rest = logits[:, groups * _GROUP :][rows]
        rest_lines, offsets = np.nonzero(rest >= bounds[:, None])
        lines = np.concatenate([lines, rest_lines])
        ids = np.concatenate([ids, offsets + groups * _GROUP])
        order = lines.argsort(kind="stable")
        lines, ids = lines[order], ids[order]
    return lines, ids


def _matrix(logits: Floats, rows: Ids, lines: Ids, ids: Ids) -> Candidates:
    """Order the candidates of each line (ascending) and put them into matrices."""
    present, first, counts = np.unique(lines, return_index=True, return_counts=True)
    index = np.repeat(np.arange(len(present)), counts)
    slots = np.arange(len(lines)) - np.repeat(first, counts)
    keys = np.full((len(present), counts.max()), _NOTHING)
    keys[index, slots] = _keys(logits[rows[lines], ids], ids)
    keys.sort(axis=1)
    valid = np.arange(keys.shape[1]) < counts[:, None]
    best = np.where(valid, keys & _LOW_HALF, 0).astype(np.intp)
    values = np.where(valid, logits[rows[present][:, None], best], np.float32(-np.inf))
    return Candidates(present, best, values)


def _keys(values: Floats, ids: Ids) -> npt.NDArray[np.uint64]:
    """Return numbers whose ascending order is: largest logit first, then smaller id."""
    bits = (np.float32(0) - values).view(np.uint32)
    ascending = np.where(bits & _SIGN, ~bits, bits | _SIGN).astype(np.uint64)
    return (ascending << _HALF) | ids.astype(np.uint64)
