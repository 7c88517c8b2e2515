"""Which bytes of a file are there: a set of ranges. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Iterator


class Extents:
    """A set of byte positions, kept as ranges `start ≤ position < end` that neither touch nor overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Take a range in; ranges that it touches become one with it."""
        if start >= end:
            return
        first = bisect.bisect_left(self._ends, start)
        last = bisect.bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def covers(self, start: int, end: int) -> bool:
        """Tell whether every byte of a range is there; an empty range always is."""
        place = bisect.bisect_right(self._starts, start) - 1
        return start >= end or (place >= 0 and self._ends[place] >= end)

    def run_from(self, start: int) -> int:
        """Return how many bytes are there without a gap from a position on; 0 if that one is not."""
        place = bisect.bisect_right(self._starts, start) - 1
        return max(0, self._ends[place] - start) if place >= 0 else 0

    @property
    def total(self) -> int:
        """How many bytes are there."""
        return sum(self._ends) - sum(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges in order."""
        return iter(list(zip(self._starts, self._ends, strict=True)))
