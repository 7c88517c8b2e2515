"""Run a command and measure what it costs: time, memory, bytes read and written."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SAMPLE_SECONDS = 0.01
_BLOCK_BYTES = 512  # the unit of ru_oublock


@dataclass(frozen=True)
class Measurement:
    """One run: wall seconds, peak of anonymous memory of the whole process tree, bytes, and CPU seconds.

    `written` were given to block devices; `read` came from any file, cached or not, the Python modules too.
    """

    seconds: float
    peak_anonymous: int
    written: int
    read: int
    cpu_seconds: float


def run_measured(command: Sequence[str], environment: Mapping[str, str]) -> Measurement:
    """Run a command to its end. Raises CalledProcessError, with what it said, if it fails.

    Memory is sampled from /proc every 10 ms; where there is none it is the peak resident size, mapped files included.
    """
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=dict(environment))
        peak = 0
        ended = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not ended.wait(SAMPLE_SECONDS):
                peak = max(peak, sum(_anonymous_bytes(pid) for pid in _tree(process.pid)))

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            read = _bytes_read(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            ended.set()
            sampler.join()
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise subprocess.CalledProcessError(process.returncode, list(command), said.read().decode()[-2000:])
    peak = peak or usage.ru_maxrss * 1024
    return Measurement(seconds, peak, usage.ru_oublock * _BLOCK_BYTES, read, usage.ru_utime + usage.ru_stime)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from _tree(int(child))
    except OSError:
        return  # it has ended, or there is no /proc


def _bytes_read(pid: int) -> int:
    """Return the bytes that a process that has ended, and the children that it waited for, read; 0 without a /proc."""
    try:
        for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def _anonymous_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
