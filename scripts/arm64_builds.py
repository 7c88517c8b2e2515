"""Builds for arm64, on any machine: ggml-base in several ways, our kernels, and a program that compares them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from upstream import find_source

SCRIPTS = Path(__file__).parent
SYSROOT = "/usr/aarch64-linux-gnu"
GCC, TARGET = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu"
TOOLS = (GCC, "aarch64-linux-gnu-g++", "qemu-aarch64", "cmake", "ninja")
_PARTS = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")


@dataclass(frozen=True)
class Reference:
    """A ggml-base: its C compiler and flags, and the kernels that must give its bytes (None: none need to).

    `but` are types, and whether with an importance matrix, that no kernels of ours encode as it does.
    """

    compiler: str
    flags: str
    kernels: str | None
    but: tuple[tuple[str, bool], ...] = ()

    @property
    def is_clang(self) -> bool:
        """Whether the compiler has to be told the target."""
        return self.compiler.startswith("clang")

    def __str__(self) -> str:
        """Return the command that compiles it."""
        return f"{self.compiler} {self.flags}".strip()


def missing_tools(references: Iterable[Reference]) -> list[str]:
    """Return those of the tools that are not installed."""
    wanted = dict.fromkeys((*TOOLS, *(reference.compiler for reference in references)))
    return [tool for tool in wanted if shutil.which(tool) is None]


def build_ggml_base(folder: Path, reference: Reference) -> Path:
    """Build upstream's library as its own CMake does. Raises `CalledProcessError`, `UpstreamError` without source."""
    build = folder / str(reference).replace(" ", "")
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_C_FLAGS": reference.flags, "BUILD_SHARED_LIBS": "ON", "GGML_NATIVE": "OFF", "GGML_OPENMP": "OFF",
        "CMAKE_C_COMPILER": reference.compiler, "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
        **{f"LLAMA_BUILD_{part}": "OFF" for part in _PARTS},
    }  # fmt: skip
    if reference.is_clang:
        settings |= {"CMAKE_C_COMPILER_TARGET": TARGET}
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    _run(["cmake", "-G", "Ninja", "-S", str(find_source()), "-B", str(build), *defined])
    _run(["ninja", "-C", str(build), "ggml-base"])
    return build / "bin" / "libggml-base.so"


def build_kernels(folder: Path, compiler: str) -> Path:
    """Build Pestle's kernels with gcc or clang. Raises `CalledProcessError`."""
    out = folder / f"kernels-{compiler}.so"
    environment = {**os.environ, "CC": GCC if compiler == "gcc" else f"{compiler} --target={TARGET}"}
    subprocess.run([sys.executable, str(SCRIPTS / "compile_kernels.py"), str(out)], env=environment, check=True)
    return out


def build_comparer(folder: Path) -> Path:
    """Build the program that compares them. Raises `CalledProcessError`."""
    out = folder / "encode_beside"
    source = str(SCRIPTS / "encode_beside.c")
    _run([GCC, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", str(out), "-ldl"])
    return out


def emulated(program: Path, *arguments: Path) -> list[str]:
    """Return the command that runs a program for arm64."""
    return ["qemu-aarch64", "-L", SYSROOT, str(program), *map(str, arguments)]


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        print(finished.stdout[-2000:], finished.stderr[-2000:], file=sys.stderr)
        finished.check_returncode()
