"""Measure Pestle's kernels against ggml's encoder: one thread, the same weights, alternating, the median of five.

    python scripts/bench_kernels.py [--megabytes M] [--runs N] [--write docs/benchmarks.md]

The weights are Gaussian and rounded to bf16. Figures are megabytes of f32 a second of the thread's own CPU time, which
is wall time where nothing else runs. The bytes must be the same. The last figure is wall time, and says something on an
idle machine only: how many times as fast two threads are as one, each with weights of its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime as dt
import itertools
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from oracle_report import processor

from app.llama import quantizer
from app.llama.library import build_name
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.native import hard_inputs
from quantize.native.encoder import KERNELS, has_kernel
from quantize.native.library import Library, open_libraries

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 2048
HEADING = "## Kernels"


def main() -> int:
    """Measure, print the table, and write it into a file if that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    libraries = open_libraries()
    if not libraries:
        print("there is no library that this machine can run: see quantize/native", file=sys.stderr)
        return 2
    names = [library.name for library in libraries]
    rows = int(asked.megabytes * 1e6 / 4 / WIDTH)
    (_, piece), = hard_inputs.pieces(1, rows * WIDTH, (hard_inputs.bf16,))  # fmt: skip
    columns = "".join(f" {name}, MB/s | times ggml |" for name in names)
    lines = [
        f"| type | importance | ggml, MB/s |{columns} same bytes | two threads |",
        "| --- | --- | --- |" + " --- | --- |" * len(names) + " --- | --- |",
    ]
    print(*lines, sep="\n")
    for name, weighted in itertools.product(KERNELS, (False, True)):
        if not has_kernel(TENSOR_TYPE_NUMBERS[name], weighted=weighted):
            continue
        lines.append(_row(name, weighted, piece.reshape(rows, WIDTH), libraries, asked.runs))
        print(lines[-1], flush=True)
    when = dt.datetime.now(dt.UTC).date().isoformat()
    lines += [
        "",
        f"{when}, {processor()}; {build_name().split(';')[0]}; one thread, {asked.megabytes:g} MB of f32, alternating,",
    ]
    lines.append(f"median of {asked.runs}, CPU time. Again: `make bench-quantize`.")
    print(*lines[-2:], sep="\n")
    if asked.write is not None:
        _write(asked.write, lines)
    return 0


def _row(name: str, weighted: bool, rows: hard_inputs.Weights, libraries: tuple[Library, ...], runs: int) -> str:
    number = TENSOR_TYPE_NUMBERS[name]
    columns = hard_inputs.importance(1, WIDTH) if weighted else None
    outs = [np.zeros(len(rows) * quantizer.row_bytes(number, WIDTH), np.uint8) for _ in range(len(libraries) + 1)]
    encoders: list[Callable[..., object]] = [quantizer.encode_rows, *(library.encode_rows for library in libraries)]
    seconds: list[list[float]] = [[] for _ in encoders]
    for _, (place, encode) in itertools.product(range(runs), enumerate(encoders)):
        began = time.thread_time()
        encode(number, rows, outs[place], columns)
        seconds[place].append(time.thread_time() - began)
    reference = median(seconds[0])
    cells = [f"{rows.nbytes / reference / 1e6:.0f}"]
    for each in seconds[1:]:
        cells += [f"{rows.nbytes / median(each) / 1e6:.0f}", f"**{reference / median(each):.1f}**"]
    same = "yes" if all(np.array_equal(outs[0], out) for out in outs[1:]) else "NO"
    gain = _two_threads(lambda out: libraries[-1].encode_rows(number, rows, out, columns), outs[0], runs)
    return f"| {name} | {'yes' if weighted else 'no'} | {' | '.join(cells)} | {same} | {gain:.2f} |"


def _two_threads(encode: Callable[[np.ndarray], object], out: np.ndarray, runs: int) -> float:
    """Return how much more two threads encode than one in the same time: the median of alternating runs."""
    outs = [out, np.empty_like(out)]
    gains = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(encode, outs))  # both threads are there
        for _ in range(runs):
            began = time.perf_counter()
            list(pool.map(encode, outs[:1]))
            halfway = time.perf_counter()
            list(pool.map(encode, outs))
            gains.append(2 * (halfway - began) / (time.perf_counter() - halfway))
    return median(gains)


def _write(path: Path, lines: list[str]) -> None:
    """Put the table in the place of the one that was there, or at the end."""
    before, _, after = path.read_text(encoding="utf-8").partition(f"{HEADING}\n")
    _, mark, rest = after.partition("\n## ")
    what = "Quantizing with kernels of our own against `ggml_quantize_chunk`, on the same weights."
    text = "\n".join([before.rstrip("\n"), "", HEADING, "", what, "", *lines, ""])
    path.write_text(text + mark + rest, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
