"""`pestle doctor`: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from app.cli.findings import Kernel, Machine, Native, Report
from app.config import cache_folder, resolve
from app.errors import ModelLoadError, StorageError

if TYPE_CHECKING:
    from app.cli.quantize import Commands

_SECONDS = 120
_GIB = 1 << 30


def add_command(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="say what runs on this machine, and why the rest does not",
        description="Looks at Python, processor, memory, disk, llama.cpp and Pestle's own kernels. Ends with 0 if all "
        "that is needed works, 3 if llama.cpp cannot be loaded, 4 if the cache folder cannot be written.",
    )
    parser.add_argument(
        "--format", choices=("human", "json", "quiet"), default="human", help="json: one object; quiet: nothing"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns the exit code."""
    report = examine()
    if arguments.format == "json":
        print(msgspec.json.encode(report).decode())
    elif arguments.format == "human":
        print("\n".join(lines(report)))
    if report.native is None:
        return ModelLoadError.exit_code
    return 0 if report.cache.writable else StorageError.exit_code


def examine() -> Report:
    """Look at everything. Raises `UsageError` or `StorageError` for settings that cannot be read."""
    from importlib.metadata import version  # noqa: PLC0415 - the other commands start without these

    from app.cli.machine import look_at_folder, look_at_machine  # noqa: PLC0415

    folder = look_at_folder(cache_folder(resolve({}).settings))
    native, problem = _native()
    return Report(version("pestle"), look_at_machine(), folder, native, problem)


def _native() -> tuple[Native | None, str | None]:
    command = [sys.executable, "-P", "-m", "app.cli.native_check"]  # a damaged library may end its process
    try:
        finished = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603 - no shell
    except subprocess.TimeoutExpired:
        return None, f"it did not answer within {_SECONDS} seconds"
    if finished.returncode == 0:
        return msgspec.json.decode(finished.stdout, type=Native), None
    said = finished.stderr.decode(errors="replace").strip().splitlines()[-1:]
    how = f"with signal {-finished.returncode}" if finished.returncode < 0 else f"with {finished.returncode}"
    return None, ": ".join([f"loading it ended {how}", *said])


def lines(report: Report) -> Iterator[str]:
    """Yield what people read."""
    machine, cache = report.machine, report.cache
    yield from _table(
        ("pestle", report.pestle),
        ("python", f"{machine.python}, {machine.platform}"),
        ("processor", f"{machine.processor}, {machine.usable_cpus} of {machine.cpus} CPUs usable"),
        ("features", " ".join(machine.features) or "not known"),
        ("memory", f"{_gib(machine.memory)}, {_gib(machine.memory_available)} available, {_limit(machine)}"),
        ("cache", f"{cache.path}, {_gib(cache.free)} free{'' if cache.writable else ': CANNOT BE WRITTEN'}"),
    )
    if report.native is None:
        yield f"llama.cpp     CANNOT BE USED: {report.problem}"
        return
    native = report.native
    yield from _table(
        ("llama.cpp", native.build),
        ("ggml", native.library),
        ("devices", "; ".join(native.devices) or "the CPU only"),
        ("threads", str(native.threads)),
        ("kernels", f"for {', '.join(native.instructions)}" if native.instructions else "none"),
    )
    for (runs, why), kernels in itertools.groupby(sorted(native.kernels, key=_fate), key=_fate):
        yield f"  {runs or f'ggml itself ({why})'}: {', '.join(_names(list(kernels)))}"


def _fate(kernel: Kernel) -> tuple[str, str]:
    return kernel.runs or "", kernel.why or ""


def _names(kernels: list[Kernel]) -> Iterator[str]:
    for name, each in itertools.groupby(kernels, key=lambda kernel: kernel.type):
        weighted = [kernel.importance for kernel in each]
        only = f" {'with' if weighted[0] else 'without'} an importance matrix"
        yield name + (only if len(weighted) == 1 else "")


def _limit(machine: Machine) -> str:
    limit = machine.memory_limit
    return "no limit of a control group" if limit is None else f"limited to {_gib(limit)} by a control group"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _table(*rows: tuple[str, str]) -> Iterator[str]:
    return (f"{name:<14}{value}" for name, value in rows)
