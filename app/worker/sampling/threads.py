"""Shares the rows of a step among a few threads: numpy lets go of the interpreter in its loops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Measured on 16 cores: 32 rows of 49,152 logits are slower on any number of threads, which wait for the interpreter
# between numpy's short loops; 32 rows of 128,256 take two thirds of the time on two or three, and more again on eight.
_WORTH_A_THREAD = 1_500_000  # logits
_MOST_THREADS = 4


class RowThreads:
    """Threads for rows that have nothing to do with each other."""

    def __init__(self, cores: int) -> None:
        """Use half of the cores, the caller's thread among them; none beside it when there are fewer than four."""
        self._count = max(1, min(cores // 2, _MOST_THREADS))
        self._pool = ThreadPoolExecutor(self._count - 1, "sampler") if self._count > 1 else None

    def share(self, work: Callable[[Sequence[int]], None], rows: Sequence[int], size: int) -> None:
        """Call `work` with parts of the rows, on as many threads as `size` logits are worth, and wait for all.

        Neighbours in `rows` go to different threads: order them by what they cost.
        """
        parts = min(self._count, len(rows), size // _WORTH_A_THREAD)
        if self._pool is None or parts < 2:
            work(rows)
            return
        others = [self._pool.submit(work, rows[part::parts]) for part in range(1, parts)]
        work(rows[::parts])
        for other in others:
            other.result()
