"""What the generator itself costs, measured against `bench.source`: at 10,000 events a second, and flat out."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.client import Target
from bench.load import Pace, drive, run_async
from bench.report import summarize
from bench.workload import PATHS, Sizing, Workload, build_bodies

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.report import Figures

STREAMS = 100
EVENTS = 500
INTERVAL_S = 0.01
TIMEOUT_S = 30.0


@contextmanager
def source(interval_s: float, seconds: float = TIMEOUT_S) -> Iterator[Target]:
    """Run the trivial server in a process of its own, and end it in any case."""
    command = [sys.executable, "-m", "bench.source", "--interval", str(interval_s), "--seconds", str(seconds)]
    folder = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            yield Target("127.0.0.1", int(process.stdout.readline()), tls=False, base_path="")
        finally:
            process.terminate()


def measure(streams: int = STREAMS, events: int = EVENTS) -> Iterator[tuple[str, Figures, dict[str, float]]]:
    """Yield name, figures and cost (events/s, microseconds of CPU an event), paced first, then flat out."""
    bodies = build_bodies(Workload(max_tokens=events), Sizing(), "source", count=streams, run=0)
    for interval_s in (INTERVAL_S, 0.0):
        with source(interval_s) as target:
            run = run_async(drive(target, PATHS["chat"], bodies, Pace(streams, timeout_s=TIMEOUT_S)))
        figures = summarize(run)
        pace = f"{streams / interval_s:,.0f} events/s offered" if interval_s else "flat out"
        cost = {
            "events_per_s": figures.events / figures.wall_s,
            "cpu_us_per_event": figures.generator_cpu * figures.wall_s / max(1, figures.events) * 1e6,
        }
        yield f"{streams} streams of {events} events, {pace}", figures, cost
