"""Compare the kernels for arm64 with ggml-base built for arm64, in an emulator, byte for byte.

    python scripts/prove_kernels_arm64.py [--megabytes M] [--type T ...] [--ggml COMPILER] [--seed N] [--work FOLDER]

ggml-base is built from the source of the llama.cpp that is installed here (PESTLE_LLAMA_CPP names it, else it is
downloaded): by GCC without contraction; by versions of Clang as they are by default, which fuse a product with a sum
where one expression has both; by GCC as it is by default, which fuses wherever it can. `--ggml` takes one of them only.
The kernels are built by GCC and by Clang. M megabytes of weights, counted in f32 and given as f32, f16 and bf16, go to
each ggml-base and to all kernels.

Ends with 1 if kernels that are meant for a ggml-base give one other byte than it. There are none for GCC's default, nor
for Q6_K with an importance matrix by Clang 16 and later: the rows show what the self-check finds there. Needs
gcc-aarch64-linux-gnu, g++-aarch64-linux-gnu, clang, the versions of Clang that are named below, qemu-user, cmake and
ninja-build (the names of Debian's packages).
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from arm64_builds import (
    GCC,
    Reference,
    build_comparer,
    build_ggml_base,
    build_kernels,
    emulated,
    missing_tools,
)
from upstream import UpstreamError

from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.native import hard_inputs
from quantize.native.encoder import KERNELS, has_kernel

REFERENCES = (
    Reference(GCC, "-ffp-contract=off", "neon"),
    Reference("clang-14", "", "neon fused 14"),
    Reference("clang-16", "", "neon fused 16", but=(("q6_K", True),)),
    Reference("clang-19", "", "neon fused 19", but=(("q6_K", True),)),
    Reference(GCC, "", None),
)
ROWS = 13
WIDTHS = (256, 768, 5376)  # the last one is more than is widened at once
SEEDS = 3 << 32  # apart
SHORT_BLOCKS = ("q8_0", "q4_0", "iq4_nl")
SOURCES = ("f32", "bf16", "f32", "f16")


def main() -> int:
    """Build, compare, and print a row for each reference, type and kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--type", choices=KERNELS, nargs="*", default=KERNELS)
    parser.add_argument("--ggml", metavar="COMPILER", help=", ".join(map(str, REFERENCES)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="build there, and keep it")
    asked = parser.parse_args()
    references = [reference for reference in REFERENCES if asked.ggml in {None, str(reference)}]
    if not references:
        parser.error(f"--ggml takes one of {', '.join(map(str, REFERENCES))}")
    if missing := missing_tools(references):
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    kinds = [(name, weighted) for name, weighted in itertools.product(asked.type, (False, True))
             if has_kernel(TENSOR_TYPE_NUMBERS[name], weighted=weighted)]  # fmt: skip
    passed = True
    with tempfile.TemporaryDirectory(prefix="pestle-") as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        try:
            kernels = [build_kernels(work, compiler) for compiler in ("gcc", "clang")]
            comparer = build_comparer(work)
            print("| ggml-base | type | importance | MB | kernels | left to ggml | differing bytes |")
            print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
            for reference in references:
                command = emulated(comparer, build_ggml_base(work, reference), *kernels)
                with Comparison(reference, command) as comparison:
                    for seed, (name, weighted) in enumerate(kinds, asked.seed):
                        weights = int(asked.megabytes * 1e6 / 4 / len(kinds))
                        passed &= comparison.compare(name, seed * SEEDS, weights, weighted=weighted)
        except (UpstreamError, subprocess.CalledProcessError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 3
    return 0 if passed else 1


class Comparison:
    """A process of `encode_beside` in the emulator."""

    def __init__(self, reference: Reference, command: list[str]) -> None:
        self._reference = reference
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        lines = [line.decode().rstrip("\n").split("\t") for line in self._lines()]
        self._kernels = [(level, Path(path).stem.removeprefix("kernels-")) for path, level in lines]

    def __enter__(self) -> Self:
        """Return the comparison itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def compare(self, name: str, seed: int, weights: int, *, weighted: bool) -> bool:
        """Compare so many weights, or a few more, and print what came of it. Returns whether that is as it must be."""
        counts = np.zeros((len(self._kernels), 2), np.int64)
        done = 0
        while done < weights:
            for request, size in requests(name, seed, weighted=weighted):
                counts += self._ask(request)
                done += size
            seed += 1
        passed = True
        for (level, compiler), (left, differing) in zip(self._kernels, counts.tolist(), strict=True):
            if self._reference.kernels not in {None, level}:
                continue
            kind = f"{self._reference} | {name} | {'yes' if weighted else 'no'} | {done * 4e-6:.1f}"
            print(f"| {kind} | {level}, by {compiler} | {left / done:.1%} | {differing} |", flush=True)
            passed &= self._reference.kernels is None or (name, weighted) in self._reference.but or differing == 0
        return passed

    def _ask(self, request: bytes) -> np.ndarray:
        assert self._process.stdin is not None
        self._process.stdin.write(request)
        self._process.stdin.flush()
        (line,) = itertools.islice(self._lines(), 1)
        return np.array(line.split(), np.int64).reshape(-1, 2)

    def _lines(self) -> Iterator[bytes]:
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) != b"\n":
            if not line:
                raise subprocess.CalledProcessError(self._process.wait(), self._process.args)
            yield line


def requests(name: str, seed: int, *, weighted: bool) -> Iterator[tuple[bytes, int]]:
    """Yield requests for `encode_beside`, one for each generator, and how many weights each has."""
    width = WIDTHS[seed % len(WIDTHS)] + (96 if name in SHORT_BLOCKS else 0)
    importance = hard_inputs.importance(seed, width).tobytes() if weighted else b""
    for place, (_, piece) in enumerate(hard_inputs.pieces(seed, ROWS * width)):
        source = SOURCES[(seed + place) % len(SOURCES)]
        numbers = TENSOR_TYPE_NUMBERS[name], TENSOR_TYPE_NUMBERS[source], ROWS, width, int(weighted)
        yield (
            np.array(numbers, np.int64).tobytes() + importance + hard_inputs.as_stored(piece, source).tobytes(),
            piece.size,
        )


if __name__ == "__main__":
    sys.exit(main())
