"""The two loops: closed (c clients, each sends its next request when its last is done) and open (Poisson arrivals)."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from bench.client import Outcome, Target, send

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Pace:
    """Closed loop with `clients`, or open loop at `rate` requests a second; none starts after `duration_s`."""

    clients: int = 1
    rate: float | None = None
    duration_s: float | None = None
    timeout_s: float = 300.0


@dataclass(slots=True)
class Run:
    """All outcomes of one run, its wall time in seconds, and the share of one core that the generator itself used."""

    outcomes: list[Outcome]
    wall_s: float
    generator_cpu: float


async def drive(target: Target, path: str, bodies: Sequence[bytes], pace: Pace, *, seed: int = 0) -> Run:
    """Send every body by the pace and wait for the last answer."""
    requests = [target.request_bytes(path, body) for body in bodies]
    gc.collect()
    gc.disable()
    cpu = sum(os.times()[:2])
    started = perf_counter()
    try:
        if pace.rate is None:
            outcomes = await _closed_loop(target, requests, pace, started)
        else:
            outcomes = await _open_loop(target, requests, pace, started, random.Random(f"arrivals-{seed}"))
    finally:
        gc.enable()
    wall = max((outcome.ended for outcome in outcomes), default=perf_counter()) - started
    return Run(outcomes, wall, (sum(os.times()[:2]) - cpu) / wall if wall > 0 else 0.0)


async def _closed_loop(target: Target, requests: Sequence[bytes], pace: Pace, started: float) -> list[Outcome]:
    waiting = iter(requests)
    outcomes: list[Outcome] = []

    async def client() -> None:
        for request in waiting:
            now = perf_counter()
            if pace.duration_s is not None and now - started >= pace.duration_s:
                return
            outcomes.append(await send(target, request, due=now, timeout_s=pace.timeout_s))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(pace.clients, len(requests))):
            group.create_task(client())
    return outcomes


async def _open_loop(
    target: Target, requests: Sequence[bytes], pace: Pace, started: float, rng: random.Random
) -> list[Outcome]:
    """Latencies count from the moment a request was due, so that a late start is not forgiven."""
    assert pace.rate is not None
    due = started
    tasks: list[asyncio.Task[Outcome]] = []
    async with asyncio.TaskGroup() as group:
        for request in requests:
            due += rng.expovariate(pace.rate)
            if pace.duration_s is not None and due - started >= pace.duration_s:
                break
            await asyncio.sleep(max(0.0, due - perf_counter()))
            tasks.append(group.create_task(send(target, request, due=due, timeout_s=pace.timeout_s)))
    return [task.result() for task in tasks]


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Use uvloop where it is installed, else asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415  optional: the generator also runs where uvloop has no build
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """Run on the fastest loop at hand. Ctrl-C cancels the work and ends in KeyboardInterrupt."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(work)
