"""Check the kernels' C code: warnings, sanitizers, and which of its branches the hard inputs reach.

    python scripts/check_kernels.py [--gigabytes G]

Compiles with every compiler that there is of gcc, clang and their like for arm64: a warning is a failure. Then compares
the kernels with ggml in a build that checks its memory accesses and its arithmetic, and in one that counts, on G
gigabytes for each type (0.001), with and without an importance matrix. Ends with 1 if something is wrong, or if a line
is never reached. Branches that are only ever taken one way are listed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from compile_kernels import SANITIZED, KernelsError, compile_library

SCRIPTS = Path(__file__).parent
COMPILERS = ("gcc", "clang", "aarch64-linux-gnu-gcc", "clang --target=aarch64-linux-gnu")
COUNTING = ("-O0", "--coverage")
_UNKNOWN = """
import sys
from pathlib import Path
import numpy as np
from app.llama import quantizer
from app.models.gguf_types import TENSOR_TYPE_NUMBERS
from quantize.native.library import open_libraries
number, refused = TENSOR_TYPE_NUMBERS["iq1_s"], 0
for library in open_libraries(Path(sys.argv[1])):
    for source, dtype in (("f32", np.float32), ("bf16", np.uint16)):
        out = np.zeros(quantizer.row_bytes(number, 256), np.uint8)
        try:
            library.encode_rows(number, np.zeros((1, 256), dtype), out, source=TENSOR_TYPE_NUMBERS[source])
        except ValueError:
            refused += 1
sys.exit(refused != 2 * len(open_libraries(Path(sys.argv[1]))))
"""


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=0.001)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pestle-") as temporary:
        work = Path(temporary)
        passed = [warns_nowhere(work), is_sane(work, asked.gigabytes), is_covered(work, asked.gigabytes)]
    return 0 if all(passed) else 1


def warns_nowhere(work: Path) -> bool:
    """Compile with each compiler, warnings being errors."""
    passed = True
    for compiler in COMPILERS:
        if shutil.which(shlex.split(compiler)[0]) is None:
            print(f"{compiler}: not installed")
            continue
        os.environ["CC"] = compiler
        try:
            compile_library(work / "warned.so", ("-Werror",))
            print(f"{compiler}: no warning", flush=True)
        except KernelsError as error:
            print(f"{compiler}: {error}")
            passed = False
    del os.environ["CC"]
    return passed


def is_sane(work: Path, gigabytes: float) -> bool:
    """Compare with a build that ends at the first wrong access or undefined operation."""
    library = work / "sanitized.so"
    compile_library(library, SANITIZED)
    runtime = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    environment = {"LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0"}  # the interpreter's own are many
    passed = compares(library, gigabytes, environment)
    print(f"address and undefined behaviour sanitizers: {'clean' if passed else 'NOT CLEAN'}", flush=True)
    return passed


def is_covered(work: Path, gigabytes: float) -> bool:
    """Compare with a build that counts; returns whether each line of it was reached."""
    objects = work / "objects"
    objects.mkdir()
    library = work / "counting.so"
    compile_library(library, COUNTING, objects)
    passed = compares(library, gigabytes, {}) and refuses(library)
    for counts in objects.glob("*.gcda"):
        subprocess.run(["gcov", "--json-format", "--branch-probabilities", counts.name], cwd=objects, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    lines: dict[tuple[str, int], int] = defaultdict(int)
    ways: dict[tuple[str, int, bool], int] = defaultdict(int)
    for report in objects.glob("*.gcov.json.gz"):
        for file in json.loads(gzip.decompress(report.read_bytes()))["files"]:
            count(file, lines, ways)
    missed = sorted(place for place, times in lines.items() if not times)
    one_way = sorted({place[:2] for place, times in ways.items() if not times})
    taken = sum(times > 0 for times in ways.values())
    print(f"lines reached: {len(lines) - len(missed)} of {len(lines)}; ways out of branches: {taken} of {len(ways)}")
    for title, places in (("never reached", missed), ("taken one way only", one_way)):
        print(*(f"{name}:{line}: {title}" for name, line in places), sep="\n")
    return passed and not missed


def count(file: dict[str, Any], lines: dict[tuple[str, int], int], ways: dict[tuple[str, int, bool], int]) -> None:
    """Add what gcov says of one source file: each line and its two ways out, in all functions and objects."""
    name = Path(file["file"]).name
    for line in file["lines"]:
        lines[name, line["line_number"]] += line["count"]
        for branch in line["branches"]:
            ways[name, line["line_number"], branch["fallthrough"]] += branch["count"]


def compares(library: Path, gigabytes: float, environment: dict[str, str]) -> bool:
    """Tell whether the kernels of a library give ggml's bytes, from each type that they read."""
    command = [sys.executable, str(SCRIPTS / "prove_kernels.py"), "--library", str(library), "--threads", "1"]
    for seed, source in ((0, "f32"), (1, "bf16"), (2, "f16")):  # seeds whose rows are of different lengths
        settings = ["--gigabytes", str(gigabytes), "--source", source, "--seed", str(seed)]
        done = subprocess.run(
            [*command, *settings], env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:])
            return False
    return True


def refuses(library: Path) -> bool:
    """Tell whether each instruction set refuses a type that it has no kernel for."""
    return subprocess.run([sys.executable, "-c", _UNKNOWN, str(library)], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
