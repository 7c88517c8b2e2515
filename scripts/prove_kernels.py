"""Compare Pestle's kernels with ggml's encoder, byte for byte, on gigabytes of hostile and ordinary weights.

    python scripts/prove_kernels.py [--gigabytes G] [--importance with|without|both] [--source f32|bf16|f16]
        [--seconds S] [--type T ...] [--seed N] [--library FILE] [--threads N]

G gigabytes of f32 weights for each type, with and without an importance matrix, on each instruction set that this
machine has, each with seeds of its own; a kernel's row is printed when it is done. Stops after S seconds. Ends with 1
if one byte differs, and names the weights: generator, seed and instruction set are all that is needed to see it again.
`--library` tests another build, such as one that checks its own memory accesses.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.encoding import available_cpus
from quantize.native import hard_inputs
from quantize.native.encoder import KERNELS, has_kernel
from quantize.native.library import PATH, Library, open_libraries

ROWS = 171  # an odd number of superblocks, and of rows, at each width
WIDTHS = (256, 768, 5376)  # the last one is more than is widened at once
SHORT_BLOCKS = ("q8_0", "q4_0", "iq4_nl")  # rows of them may end anywhere in a group


@dataclass
class Count:
    """What was compared with one kernel."""

    weights: int = 0
    asked: int = 0
    differing: int = 0
    failures: list[str] = field(default_factory=list)


def main() -> int:
    """Compare, and print a row for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--importance", choices=("with", "without", "both"), default="both")
    parser.add_argument("--source", choices=("f32", "bf16", "f16"), default="f32", help="what the kernels read")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--type", choices=KERNELS, nargs="*", default=KERNELS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", type=Path, default=PATH)
    parser.add_argument("--threads", type=int, default=available_cpus())
    asked = parser.parse_args()
    if not open_libraries(asked.library):
        print(f"{asked.library}: no library that this machine can run", file=sys.stderr)
        return 2
    counts: dict[tuple[str, bool, str], Count] = {}
    deadline = time.monotonic() + asked.seconds
    weightings = {"with": (True,), "without": (False,), "both": (False, True)}[asked.importance]
    print("| type | importance | instructions | GB of f32 | left to ggml | differing bytes |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with concurrent.futures.ThreadPoolExecutor(asked.threads) as pool:
        work = [
            pool.submit(_compare, asked, name, seed, deadline, weighted=weighted)
            for seed, (name, weighted) in enumerate(itertools.product(asked.type, weightings), asked.seed << 32)
            if has_kernel(TENSOR_TYPE_NUMBERS[name], weighted=weighted)
        ]
        for done in work:
            counts.update(done.result())
            print(*(_row(*kernel, count) for kernel, count in done.result().items()), sep="\n", flush=True)
    failures = [line for count in counts.values() for line in count.failures]
    failures += [f"{name}: nothing was compared in time" for (name, *_), count in counts.items() if not count.weights]
    print(*failures[:20], sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _row(name: str, weighted: bool, level: str, count: Count) -> str:
    share, size = count.asked / max(1, count.weights), count.weights * 4 / 1e9
    return f"| {name} | {'yes' if weighted else 'no'} | {level} | {size:.2f} | {share:.2%} | {count.differing} |"


def _compare(
    asked: argparse.Namespace, name: str, seed: int, deadline: float, *, weighted: bool
) -> dict[tuple[str, bool, str], Count]:
    libraries = open_libraries(asked.library)
    weights = asked.gigabytes * 1e9 / 4
    counts = {(name, weighted, library.name): Count() for library in libraries}
    while min(count.weights for count in counts.values()) < weights and time.monotonic() < deadline:
        width = WIDTHS[seed % len(WIDTHS)] + (96 if name in SHORT_BLOCKS else 0)
        columns = hard_inputs.importance(seed, width) if weighted else None
        for generator, piece in hard_inputs.pieces(seed, ROWS * width):
            rows = hard_inputs.as_stored(piece, asked.source).reshape(ROWS, width)
            theirs = _encode(None, name, rows, asked.source, columns)[0]
            for library in libraries:
                ours, left = _encode(library, name, rows, asked.source, columns)
                count = counts[name, weighted, library.name]
                count.weights += rows.size
                count.asked += left
                if different := int(np.count_nonzero(ours != theirs)):
                    count.differing += different
                    where = f"{name}{' weighted' if weighted else ''} {library.name}"
                    count.failures.append(f"{where}: {different} bytes of {generator}, seed {seed}, width {width}")
        seed += 1
    return counts


def _encode(
    library: Library | None, name: str, rows: np.ndarray, source: str, columns: hard_inputs.Weights | None
) -> tuple[np.ndarray, int]:
    number = TENSOR_TYPE_NUMBERS[name]
    out = np.zeros(len(rows) * quantizer.row_bytes(number, rows.shape[1]), np.uint8)
    if library is not None:
        return out, library.encode_rows(number, rows, out, columns, TENSOR_TYPE_NUMBERS[source])
    if source != "f32":
        narrow, rows = rows, np.empty(rows.shape, np.float32)
        (quantizer.bf16_to_f32 if source == "bf16" else quantizer.f16_to_f32)(narrow, rows)
    quantizer.encode_rows(number, rows, out, columns)
    return out, 0


if __name__ == "__main__":
    sys.exit(main())
