"""Compile the C files of quantize/native into one shared library.

    python scripts/compile_kernels.py OUT [--sanitize]

CC names the compiler. `--sanitize` makes a library that checks its memory accesses and its arithmetic; to use it, the
program that loads it needs LD_PRELOAD="$(cc -print-file-name=libasan.so)". Ends with 1, and says why, if there can be
no library. PESTLE_KERNELS=off leaves it out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "quantize" / "native"
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
OBJECTS = (  # source, and what it is compiled with: one object for each instruction set
    ("entry.c", ()),
    ("kernels.c", ("-DENCODE=encode_sse2",)),
    ("kernels.c", ("-mavx2", "-DENCODE=encode_avx2")),
)


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


def compile_library(target: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile into `target`, which is replaced when the new library is whole. Raises `KernelsError`."""
    if os.environ.get("PESTLE_KERNELS") == "off":
        raise KernelsError("PESTLE_KERNELS is off")
    if platform.machine() not in {"x86_64", "AMD64"}:
        raise KernelsError(f"there are no kernels for {platform.machine()}")
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(prefix="pestle-") as folder:
        objects = [str(Path(folder, f"{number}.o")) for number in range(len(OBJECTS))]
        commands = [
            [*compiler, *FLAGS, *flags, *extra, "-c", str(SOURCES / source), "-o", out]
            for out, (source, flags) in zip(objects, OBJECTS, strict=True)
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


def _run(command: list[str]) -> None:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsError(f"{command[0]}: {error}") from error
    if finished.returncode != 0:
        raise KernelsError(f"{shlex.join(command)} failed:\n{finished.stderr[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
