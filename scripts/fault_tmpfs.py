"""Quantizes into file systems that are too small by more and by less, if one can be mounted."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fault_points import ROOT, Run

PAGE = 4096


@dataclass
class Report:
    """What to print, and what did not hold."""

    text: str
    failures: list[str] = field(default_factory=list)


def tmpfs_report(run: Run, work: Path) -> Report:
    """Run where there is room for a part of the file only, and where there is just enough."""
    needed = (work / "whole" / "Model-Q8_0.gguf").stat().st_size
    pages = -(-needed // PAGE)
    sizes = [
        1,
        2,
        5,
        *(pages * part // 10 for part in range(1, 10)),
        pages - 2,
        pages - 1,
        pages,
        pages + 2,
        pages + 16,
    ]
    report, refused, made = Report(""), 0, 0
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=work) as folder, _mounted(Path(folder), size * PAGE) as mounted:
            if not mounted:
                return Report(
                    "file systems that are too small: none can be mounted here; strace's faults stand for them"
                )
            out = Path(folder, "model.gguf")
            finished = subprocess.run(run.command(out), cwd=ROOT, capture_output=True, text=True, check=False)
            left = [path.name for path in Path(folder).iterdir() if ".card." not in path.name]
            clear = f"no room for model.gguf: {needed} bytes are needed" in finished.stderr
            if finished.returncode == 4 and clear and not left:
                refused += 1
            elif left == [out.name] and size >= pages and _is_made(finished):
                made += 1
            else:
                said = f"{finished.returncode}, {left}, {finished.stderr[-300:]}"
                report.failures.append(f"{size * PAGE} bytes of room: {said}")
    report.text = (
        f"file systems (tmpfs) too small or just large enough for {needed} bytes: {len(sizes)}; refused before the "
        f"work with the numbers {refused}, made {made}, failed {len(report.failures)}"
    )
    return report


def _is_made(finished: subprocess.CompletedProcess[str]) -> bool:
    """Tell whether the file is there: with its card, or with an error that says that only the card found no room."""
    return finished.returncode == 0 or (finished.returncode == 4 and "is whole; its card is not" in finished.stderr)


@contextlib.contextmanager
def _mounted(folder: Path, size: int) -> Iterator[bool]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
