"""Compile the C files of quantize/native into one shared library.

    python scripts/compile_kernels.py OUT [--sanitize]

CC names the compiler, and with it the processor: `CC=aarch64-linux-gnu-gcc` makes a library for arm64. `--sanitize`
makes one that checks its memory accesses and its arithmetic; to use it, the program that loads it needs
LD_PRELOAD="$(cc -print-file-name=libasan.so)". Warnings are printed. Ends with 1, and says why, if there can be no
library. PESTLE_KERNELS=off leaves it out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "quantize" / "native"
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
SANITIZED = (
    "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
    "-Wno-stringop-overflow",  # GCC's own checks make it see sizes that cannot be
)  # fmt: skip
KERNELS = {  # by what the compiler says of its target: what kernels.c is compiled with, once for each variant
    "x86_64": (("-DENCODE=encode_sse2",), ("-mavx2", "-DENCODE=encode_avx2")),
    "aarch64": (
        ("-DENCODE=encode_neon",),
        *((f"-DFUSED={version}", f"-DENCODE=encode_neon_fused_{version}") for version in (14, 16, 19)),
    ),
}


class KernelsError(Exception):
    """There will be no library, and why."""


def main() -> int:
    """Compile, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    asked = parser.parse_args()
    try:
        compile_library(asked.out, SANITIZED if asked.sanitize else ())
    except (KernelsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def compile_library(target: Path, extra: Sequence[str] = (), keep: Path | None = None) -> None:
    """Compile into `target`, which is replaced when the new library is whole. Raises `KernelsError`.

    `extra` are more flags; `keep` is a folder for the objects, which else are removed.
    """
    if os.environ.get("PESTLE_KERNELS") == "off":
        raise KernelsError("PESTLE_KERNELS is off")
    compiler = find_compiler()
    units = [("entry.c", ()), *(("kernels.c", flags) for flags in KERNELS[find_target(compiler)])]
    with tempfile.TemporaryDirectory(prefix="pestle-") as folder:
        objects = [str(Path(keep or folder, f"{number}.o")) for number in range(len(units))]
        commands = [
            [*compiler, *FLAGS, *flags, *extra, "-c", str(SOURCES / source), "-o", out]
            for out, (source, flags) in zip(objects, units, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        library = Path(folder, target.name)
        _run([*compiler, *extra, "-shared", "-o", str(library), *objects, "-lm"])
        part = target.with_name(f".{target.name}")
        shutil.copyfile(library, part)
        part.replace(target)  # a process that has the old one open keeps it


def find_compiler() -> list[str]:
    """Return the command of the C compiler. Raises `KernelsError` if there is none."""
    if asked := shlex.split(os.environ.get("CC", "")):
        return asked
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise KernelsError("there is no C compiler: install one, or set CC")


def find_target(compiler: list[str]) -> str:
    """Return the key of `KERNELS` that a compiler compiles for. Raises `KernelsError` if there is none."""
    triple = _run([*compiler, "-dumpmachine"]).strip()
    machine = triple.partition("-")[0].replace("arm64", "aarch64").replace("amd64", "x86_64")
    if machine not in KERNELS:
        raise KernelsError(f"there are no kernels for {triple or machine}")
    return machine


def _run(command: list[str]) -> str:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsError(f"{command[0]}: {error}") from error
    if finished.returncode != 0:
        raise KernelsError(f"{shlex.join(command)} failed:\n{finished.stderr[-2000:]}")
    if finished.stderr:
        print(finished.stderr, file=sys.stderr)  # warnings
    return finished.stdout


if __name__ == "__main__":
    sys.exit(main())
