"""The temporary file of a target: its name, its lock, and what becomes of those that dead processes leave.

A process holds the lock of its file for as long as it lives. A file whose lock can be taken is a dead one's: it is
removed, or continued, by who holds the lock and sees that the file still has its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from quantize.extents import Extents
from quantize.journal import Head, Journal, holds

_PART, _JOURNAL = ".pestle-part", ".pestle-journal"


@dataclasses.dataclass
class Part:
    """A temporary file; open and locked once `create` or `take` has returned True."""

    path: Path
    file: int = -1

    @classmethod
    def named_for(cls, target: Path) -> Part:
        """Choose a name that no other run has."""
        return cls(target.parent / f".{target.name}.{secrets.token_hex(8)}{_PART}")

    @property
    def journal(self) -> Path:
        """Where its journal is."""
        return self.path.with_suffix(_JOURNAL)

    def create(self) -> bool:
        """Create the file; False if another run took it for a dead one's before it was locked. Raises `OSError`."""
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        return self._lock()

    def take(self) -> bool:
        """Open a file that was left; False if its process lives or it is gone."""
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        return self._lock()

    def close(self, *, remove: bool) -> None:
        """Let go of the lock, after taking the file and its journal away if they are not to stay."""
        if remove:
            for path in (self.path, self.journal):
                with contextlib.suppress(OSError):
                    path.unlink()
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _lock(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self.file), self.path.stat(follow_symlinks=False))
        except OSError:
            return False


def continue_part(target: Path, head: Head) -> tuple[Part, Journal, Extents] | None:
    """Take over the dead run's file that has the most of what `head` describes, and say which bytes it has."""
    best: tuple[Part, Journal, Extents] | None = None
    for part in _dead_parts(target):
        found = _continued(part, head)
        if found is not None and best is not None and found[2].total > best[2].total:
            found, best = best, found
        if best is None:
            best = found
        elif found is not None:
            found[1].close()
            found[0].close(remove=False)
    return best


def sweep(target: Path) -> None:
    """Remove temporary files of this target whose process is gone."""
    for part in _dead_parts(target):
        part.close(remove=True)
    for journal in _left(target, _JOURNAL):
        if not journal.with_suffix(_PART).exists():  # a part is there before its journal is
            with contextlib.suppress(OSError):
                journal.unlink()


def _continued(part: Part, head: Head) -> tuple[Part, Journal, Extents] | None:
    reopened = Journal.reopen(part.journal, head) if os.fstat(part.file).st_size <= head.size else None
    if reopened is None:
        part.close(remove=False)
        return None
    journal, ranges = reopened
    there = Extents()
    for known in ranges:
        if holds(part.file, known):
            there.add(known.start, known.end)
    return part, journal, there


def _dead_parts(target: Path) -> Iterator[Part]:
    for path in _left(target, _PART):
        part = Part(path)
        if part.take():
            yield part
        else:
            part.close(remove=False)


def _left(target: Path, suffix: str) -> list[Path]:
    if not target.parent.is_dir():
        return []
    name = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{16}" + re.escape(suffix))
    return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
