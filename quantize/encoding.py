"""Encodes slabs on threads, in order: while one is written, the next are computed."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantize.checkpoint import Checkpoint, Told, Wanted
from quantize.importance import ImportanceMatrix
from quantize.kernels import encode
from quantize.loss import Losses
from quantize.plan import Plan, PlannedTensor
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
    fetched: Told = lambda _count: None,
    through_bf16: Sequence[bool],
    importance: ImportanceMatrix | None,
    losses: Sequence[Losses] = (),
    missing: Callable[[list[Slab]], bool] = lambda _slabs: True,
) -> Generator[tuple[list[Slab], list[memoryview]], None, None]:
    """Yield every slab of every file with its bytes, in the first file's order; they are valid until the next one.

    Where weights come in rounds, the order is that within each. `fetched` is told of the bytes that come meanwhile.
    Slabs that are not `missing` are left out. Memory is bounded by the number of threads: a slab that waits to be
    written keeps its workspace. `losses`, one for each file if any, hear what each tensor loses.
    """

    def encode_slabs(slabs: list[Slab], space: Workspace) -> list[NDArray[np.uint8]]:
        return encode(slabs, checkpoint, space, through_bf16=through_bf16, importance=importance, losses=losses)

    parts = [part for tensor in plans[0].tensors for part in tensor.spec.parts]
    with contextlib.closing(checkpoint.rounds(parts, fetched)) as rounds:
        for wanted in rounds:
            there = _together(plans, wanted)
            waiting = ([slabs for slabs in twins if missing(slabs)] for twins in there)
            yield from _round(filter(None, waiting), threads, encode_slabs)


def _round(
    waiting: Iterator[list[list[Slab]]],
    threads: int,
    encode_slabs: Callable[[list[Slab], Workspace], list[NDArray[np.uint8]]],
) -> Generator[tuple[list[Slab], list[memoryview]], None, None]:

    def work(twins: list[list[Slab]], space: Workspace) -> list[list[memoryview]]:
        space.forget()
        return [[piece.data for piece in encode_slabs(slabs, space.twin(number))] for number, slabs in enumerate(twins)]

    free = [Workspace() for _ in range(threads * 2 + 2)]
    pending: collections.deque[tuple[list[list[Slab]], Workspace, concurrent.futures.Future[list[list[memoryview]]]]]
    pending = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        try:
            for twins in waiting:
                if not free:
                    done, space, future = pending.popleft()
                    yield from zip(done, future.result(), strict=True)
                    free.append(space)
                space = free.pop()
                pending.append((twins, space, pool.submit(work, twins, space)))
            while pending:
                done, _, future = pending.popleft()
                yield from zip(done, future.result(), strict=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _together(plans: Sequence[Plan], wanted: Wanted) -> Iterator[list[list[Slab]]]:
    """Yield slabs that are read at once: twins, and of each the same rows of every file."""
    others = [{tensor.spec.name: tensor for tensor in plan.tensors} for plan in plans[1:]]
    for twins in _twins(plans[0].tensors):
        for slabs in zip(*(slabs_of(tensor, wanted) for tensor in twins), strict=True):
            yield [
                [slab, *(dataclasses.replace(slab, tensor=tensors[slab.tensor.spec.name]) for tensors in others)]
                for slab in slabs
            ]


def _twins(tensors: Sequence[PlannedTensor]) -> Iterable[list[PlannedTensor]]:
    """Put tensors together that take each their rows of the same groups of rows, such as gates and ups by turns."""
    twins: dict[Hashable, list[PlannedTensor]] = {}
    for tensor in tensors:
        key: Hashable = tensor.spec.name
        if tensor.spec.parts and all(part.unit < part.group for part in tensor.spec.parts):
            read = [
                (part.sources, part.start, part.rows, part.width, part.group, part.unit, part.stride)
                for part in tensor.spec.parts
            ]
            key = (tensor.spec.shape, *read)
        twins.setdefault(key, []).append(tensor)
    return twins.values()
