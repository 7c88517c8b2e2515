"""Faults at system calls of a quantization: strace counts the calls of a run, then kills or fails one of them."""

from __future__ import annotations

import collections
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

KILLED = 128 + 9
SECONDS = 600  # a busy machine is no fault

# all that could change what is on the disk, and what reads it again
CALLS = ("openat", "write", "pwrite64", "pread64", "fsync", "fdatasync", "fallocate", "ftruncate", "flock", "rename",
         "unlink")  # fmt: skip
FILLING = ("write", "pwrite64", "fsync", "fdatasync", "fallocate", "rename")

_LINE = re.compile(r"(\d+) +(\w+)\((.*)")
_BEGIN = ".pestle-part"  # the first call that has it opens the temporary file


@dataclass(frozen=True)
class Point:
    """The `number`-th call of this name on any one thread of the run; `effect` is what strace injects there."""

    call: str
    number: int
    effect: str

    def __str__(self) -> str:
        """Return it as strace is told it."""
        return f"{self.call}:{self.effect}:when={self.number}{'+' if self.effect.startswith('error') else ''}"


@dataclass(frozen=True)
class Run:
    """A quantization that is started anew for each fault: its arguments but for `--out`."""

    arguments: tuple[str, ...]
    resume: bool = False

    def command(self, out: Path) -> list[str]:
        """Return the command line of a process of its own."""
        return [sys.executable, "-P", "-m", "quantize", *self.flags(out)]

    def flags(self, out: Path) -> list[str]:
        """Return the arguments."""
        return [*self.arguments, "--out", str(out), "--threads", "2", "--no-measure", "--format", "quiet"]


def traced_calls(run: Run, out: Path, log: Path) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Run once without a fault; return how many calls one thread makes at most, before the file is begun and in all."""
    _strace(["-o", str(log), "-e", f"trace={','.join(CALLS)}"], run.command(out)).check_returncode()
    before: collections.Counter[tuple[str, str]] = collections.Counter()
    total: collections.Counter[tuple[str, str]] = collections.Counter()
    begun = False
    for line in log.read_text(errors="replace").splitlines():
        if found := _LINE.match(line):
            begun = begun or _BEGIN in found[3]
            total[found[1], found[2]] += 1
            before[found[1], found[2]] += not begun
    return _most(before), _most(total)


def kill_points(before: collections.Counter[str], total: collections.Counter[str], seed: int) -> list[Point]:
    """Return a point for every call after the file was begun, and for a few of those before, in random order."""
    draw = random.Random(seed)
    points = [
        Point(call, number, "signal=KILL") for call in CALLS for number in range(before[call] + 1, total[call] + 1)
    ]
    early = [Point(call, number, "signal=KILL") for call in CALLS for number in range(1, before[call] + 1)]
    points += draw.sample(early, min(len(early), len(points) // 10))
    draw.shuffle(points)
    return points


def full_points(before: collections.Counter[str], total: collections.Counter[str], seed: int) -> list[Point]:
    """Return points from which on the disk is full, or over its quota, in random order."""
    points = [
        Point(call, number, f"error={error}")
        for call in FILLING
        for number in range(before[call] + 1, total[call] + 1)
        for error in ("ENOSPC", "EDQUOT")
    ]
    random.Random(seed).shuffle(points)
    return points


def run_with(run: Run, out: Path, points: Sequence[Point]) -> subprocess.CompletedProcess[str]:
    """Run with faults; the exit code is 137 if it was killed."""
    flags = ["-o", "/dev/null", "-e", f"trace={','.join(sorted({point.call for point in points}))}"]
    for point in points:
        flags += ["-e", f"inject={point}"]
    finished = _strace(flags, run.command(out))
    if finished.returncode < 0:
        finished.returncode = 128 - finished.returncode
    return finished


def _strace(flags: Iterable[str], command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # the tokenizer's proof is a process of its own: strace lets go of it
    return subprocess.run(
        ["strace", "-f", "-b", "execve", "-qq", *flags, *command],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def _most(counts: collections.Counter[tuple[str, str]]) -> collections.Counter[str]:
    most: collections.Counter[str] = collections.Counter()
    for (_, call), count in counts.items():
        most[call] = max(most[call], count)
    return most
