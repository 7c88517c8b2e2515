"""Encodes slabs on threads, in order: while one is written, the next are computed."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from quantize.checkpoint import Checkpoint
from quantize.importance import ImportanceMatrix
from quantize.kernels import encode
from quantize.plan import Plan
from quantize.slabs import Slab, Workspace, slabs_of


def available_cpus() -> int:
    """Return how many processors this process may use: the smaller of its affinity and its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return max(1, cpus)


def encoded(
    plans: Sequence[Plan],
    checkpoint: Checkpoint,
    threads: int,
    *,
    through_bf16: Sequence[bool],
    importance: ImportanceMatrix | None,
    wanted: Callable[[list[Slab]], bool] = lambda _slabs: True,
) -> Generator[tuple[list[Slab], list[memoryview]], None, None]:
    """Yield every slab of every file with its bytes, in the first file's order; they are valid until the next one.

    Those that are not `wanted` are left out. Memory is bounded by the number of threads: a slab that waits to be
    written keeps its workspace.
    """

    def work(slabs: list[Slab], space: Workspace) -> list[memoryview]:
        pieces = encode(slabs, checkpoint, space, through_bf16=through_bf16, importance=importance)
        return [piece.data for piece in pieces]

    free = [Workspace() for _ in range(threads * 2 + 2)]
    pending: collections.deque[tuple[list[Slab], Workspace, concurrent.futures.Future[list[memoryview]]]]
    pending = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        try:
            for slabs in filter(wanted, _together(plans)):
                if not free:
                    done, space, future = pending.popleft()
                    yield done, future.result()
                    free.append(space)
                space = free.pop()
                pending.append((slabs, space, pool.submit(work, slabs, space)))
            while pending:
                done, _, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _together(plans: Sequence[Plan]) -> Iterator[list[Slab]]:
    """Yield the same rows of every file together."""
    others = [{tensor.spec.name: tensor for tensor in plan.tensors} for plan in plans[1:]]
    for tensor in plans[0].tensors:
        same = [tensors[tensor.spec.name] for tensors in others]
        for slab in slabs_of(tensor):
            yield [slab, *(dataclasses.replace(slab, tensor=other) for other in same)]
