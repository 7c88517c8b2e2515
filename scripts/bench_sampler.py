"""Measure the sampler alone: milliseconds of a step's sampling, by rows, vocabulary and way of drawing.

    python scripts/bench_sampler.py [--rows 8,32,64] [--vocabulary 49152,128256] [--threads 1,8] [--runs 20] [--cpu]
    python scripts/bench_sampler.py --against OTHER_CHECKOUT

The logits are random, shaped like a model's: some tokens far above a broad rest. Each figure is the best of the runs;
`--cpu` counts CPU time (of all threads) instead of the clock's, for a machine that others use too. `--against` prints
the figures of another checkout's `app.worker` first, by the same logits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
HISTORY = 2000  # tokens

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top-k 40, top-p .95, temp .8": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "top-p .95": {"top_p": 0.95},
    "min-p .05": {"min_p": 0.05},
    "penalties": {"temperature": 0, "repeat_penalty": 1.1, "repeat_last_n": 64},
    "penalties, whole slot": {"temperature": 0, "repeat_penalty": 1.1, "repeat_last_n": -1},
    "DRY": {"temperature": 0, "dry_multiplier": 0.8, "dry_penalty_last_n": -1},
    "typical .95": {"typical_p": 0.95},
    "all filters": {
        "temperature": 0.8,
        "top_k": 40,
        "typical_p": 0.98,
        "top_p": 0.95,
        "min_p": 0.01,
        "xtc_probability": 0.5,
        "repeat_penalty": 1.1,
        "dry_multiplier": 0.8,
    },
}


def main() -> int:
    """Print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="8,32,64")
    parser.add_argument("--vocabulary", default="49152,128256")
    parser.add_argument("--threads", default="1", help="threads that may share the rows")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of the clock's")
    parser.add_argument("--against", type=Path, help="another checkout of Pestle, measured first")
    parser.add_argument("--checkout", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.against:
        passed = [flag for flag in sys.argv[1:] if flag not in ("--against", str(arguments.against))]
        print(f"## {arguments.against.name}", flush=True)
        subprocess.run([sys.executable, __file__, *passed, "--checkout", str(arguments.against)], check=True)
        print("## this checkout", flush=True)
    sys.path.insert(0, str(arguments.checkout))
    clock = time.process_time if arguments.cpu else time.perf_counter
    rows = [int(count) for count in arguments.rows.split(",")]
    for vocabulary in map(int, arguments.vocabulary.split(",")):
        for threads in map(int, arguments.threads.split(",")):
            print(f"\nvocabulary {vocabulary}, threads {threads}: ms{' of CPU' if arguments.cpu else ''} a step\n")
            print(f"| way | {' | '.join(f'{count} rows' for count in rows)} |\n|---|{'---|' * len(rows)}")
            for name in [*WAYS, "logprobs, top 20"]:
                figures = [measured(name, count, vocabulary, threads, arguments.runs, clock) for count in rows]
                cells = ("-" if figure is None else f"{figure * 1000:.2f}" for figure in figures)
                print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def measured(
    name: str, rows: int, vocabulary: int, threads: int, runs: int, clock: Callable[[], float]
) -> float | None:
    """Return the best time of one step in seconds; None for what this checkout does not know."""
    logits = model_like(rows, vocabulary)
    random = np.random.default_rng(1)
    histories = random.integers(0, 500, (rows, HISTORY + runs)).astype(np.int32)
    step = stepper(name, rows, vocabulary, threads)
    if step is None:
        return None
    best = float("inf")
    for run in range(runs):
        fresh = logits.copy()
        past = [history[: HISTORY + run] for history in histories]
        started = clock()
        step(fresh, past)
        best = min(best, clock() - started)
    return best


def stepper(
    name: str, rows: int, vocabulary: int, threads: int
) -> Callable[[np.ndarray, list[np.ndarray]], object] | None:
    """Return what samples one step, by this checkout's modules."""
    from app.messages import Sampling  # noqa: PLC0415 - from the checkout that is measured

    way = WAYS.get(name, {})
    if not set(way) <= set(Sampling.__struct_fields__):
        return None
    try:
        from app.worker.sampling.batch import sample  # noqa: PLC0415
        from app.worker.sampling.logprobs import raw_logprobs  # noqa: PLC0415
        from app.worker.sampling.sampler import TokenSampler  # noqa: PLC0415
        from app.worker.sampling.threads import RowThreads  # noqa: PLC0415
    except ModuleNotFoundError:
        return older_stepper(way, rows, vocabulary)
    samplers = [TokenSampler(Sampling(seed=seed, **way), vocabulary) for seed in range(rows)]
    pool = RowThreads(2 * threads)
    if not way:
        return lambda logits, _: raw_logprobs(logits, [20] * rows, [False] * rows, pool)
    return lambda logits, histories: sample(logits, samplers, histories, threads=pool)


def older_stepper(way: dict[str, Any], rows: int, vocabulary: int) -> Callable[[np.ndarray, list[np.ndarray]], object]:
    """Return the same for checkouts whose sampler is one module, which works row by row."""
    from app.worker.sampler import TokenSampler, logprobs, sample  # type: ignore[import-not-found] # noqa: PLC0415

    from app.messages import Sampling  # noqa: PLC0415

    samplers = [TokenSampler(Sampling(seed=seed, **way), vocabulary) for seed in range(rows)]
    if not way:
        return lambda logits, _: [logprobs(row, 20) for row in logits]
    return lambda logits, histories: sample(logits, samplers, histories)


def model_like(rows: int, vocabulary: int) -> np.ndarray:
    """Return logits in which the n-th of 200 tokens weighs about n to the power of -1 to -3, above a broad rest."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((rows, vocabulary)) * 1.5
    for row in logits:
        best = random.choice(vocabulary, 200, replace=False)
        row[best] += random.uniform(10, 16) - random.uniform(1.0, 3.0) * np.log(np.arange(1, 201))
    return logits.astype(np.float32)


if __name__ == "__main__":
    sys.exit(main())
