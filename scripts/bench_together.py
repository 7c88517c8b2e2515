"""Measure what several types cost in one read of the source, against a run for each of them.

    python scripts/bench_together.py [--model default|llama-1b|DIR] [--runs N] [--threads N]

Each round makes every type alone and then all of them together; medians of wall and CPU time, and the ratio of together
to the sum of the single runs. Exit codes: 0 the ratio of CPU time is at most 1.1, 1 it is not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_quantize import BYTECODE_IS_KEPT, checkpoint_folder, pestle_command, warm
from bench_quantize import TOGETHER as TYPES
from measured_process import Measurement, run_measured

FLOOR = 1.1


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="llama-1b", metavar="NAME|DIR", help="default, llama-1b, or a folder")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    arguments = parser.parse_args()
    checkpoint = checkpoint_folder(arguments.model)
    warm(checkpoint)
    alone: dict[str, list[Measurement]] = {name: [] for name in TYPES}
    together: list[Measurement] = []
    for _ in range(arguments.runs):
        for name in TYPES:
            alone[name].append(quantized(checkpoint, name, arguments.threads))
        together.append(quantized(checkpoint, ",".join(TYPES), arguments.threads))
    ratio = 0.0
    for what in ("seconds", "cpu_seconds"):
        single = sum(median(getattr(run, what) for run in runs) for runs in alone.values())
        all_at_once = median(getattr(run, what) for run in together)
        ratio = all_at_once / single
        print(f"{what}: {all_at_once:.2f} together, {single:.2f} one by one ({', '.join(TYPES)}): {ratio:.2f}x")
    return 0 if ratio <= FLOOR else 1


def quantized(checkpoint: Path, types: str, threads: int) -> Measurement:
    """Quantize into a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=checkpoint.parent) as folder:
        out = Path(folder) / ("all" if "," in types else "one.gguf")
        os.sync()
        return run_measured(pestle_command(checkpoint, types, out, threads), dict(os.environ) | BYTECODE_IS_KEPT)


if __name__ == "__main__":
    sys.exit(main())
