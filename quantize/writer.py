"""Writes a file that is either whole or not there.

The bytes go to a temporary file in the target's folder, whose room is reserved first; it takes the target's name only
when it is complete, on the disk and verified. A lock tells the temporary file of a running process from a dead one's.
A journal beside it says what has come to the disk, so that a later run can go on where this one was killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from app.errors import StorageError
from quantize.extents import Extents
from quantize.journal import Head, Journal, Range, RunningRange
from quantize.part import Part, continue_part, sweep

_LEAST_SYNC_BYTES, _MOST_SYNC_BYTES = 1 << 18, 1 << 26
_SYNCS = 64  # so often, at least, a file is brought to the disk while it is made
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}


class AtomicFile:
    """A context manager: `write_at` every byte, `check`, then `publish`; else it leaves nothing behind.

    `run` says what the content follows from. With `resume`, a dead run's temporary file of the same `run` is taken
    over: see `has`; and what an interruption (KeyboardInterrupt) or a `StorageError` stops stays for the next run.
    """

    def __init__(self, target: Path, size: int, run: str = "", *, resume: bool = False) -> None:
        self._target = target
        self._size = size
        self._folder = target.parent
        self._head, self._resume = Head(run, size), resume
        self._part: Part | None = None
        self._journal: Journal | None = None
        self._there = Extents()
        self._running = RunningRange()
        self._unsynced: list[Range] = []
        self._unsynced_bytes = 0
        self._sync_bytes = min(max(size // _SYNCS, _LEAST_SYNC_BYTES), _MOST_SYNC_BYTES)
        self._sync: threading.Thread | None = None
        self.resumed_bytes = 0
        """How many bytes an earlier run had written."""

    def __enter__(self) -> Self:
        """Create the temporary file and reserve its room. Raises `StorageError` that names the folder and the need."""
        try:
            if not self._resume or not self._continue():
                self._create()
            sweep(self._target)
            self._reserve()
        except BaseException as error:
            self._leave(keep=self.resumed_bytes > 0)
            if isinstance(error, OSError):
                raise self._storage_error(error) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the temporary file, unless it was published or is kept for the next run."""
        can_go_on = kind is not None and issubclass(kind, (KeyboardInterrupt, StorageError))
        self._leave(keep=self._resume and can_go_on and self._there.total > 0)

    @property
    def there(self) -> Iterable[tuple[int, int]]:
        """The ranges of bytes that are there."""
        return self._there

    def has(self, start: int, end: int) -> bool:
        """Tell whether these bytes are there already, from an earlier run or from this one."""
        return self._there.covers(start, end)

    def write_at(self, offset: int, data: memoryview) -> None:
        """Put bytes where they belong; the order does not matter."""
        if self._part is None:
            raise AssertionError("the file is not open")
        start, rest = offset, data
        try:
            while rest:
                written = os.pwrite(self._part.file, rest, offset)
                offset += written
                rest = rest[written:]
        except OSError as error:
            raise self._storage_error(error) from error
        if start != self._running.end:
            self._end_range()
            self._running = RunningRange(start, start)
        self._running.extend(data)
        self._there.add(start, offset)
        self._unsynced_bytes += len(data)
        if self._unsynced_bytes >= self._sync_bytes and (self._sync is None or not self._sync.is_alive()):
            self._sync = threading.Thread(target=self._sync_quietly, args=(self._take_unsynced(),), daemon=True)
            self._sync.start()

    def read_back(self, offset: int, length: int) -> bytes:
        """Return bytes that were written, at least one of them. Raises `StorageError`."""
        if self._part is None:
            raise AssertionError("the file is not open")
        try:
            data = os.pread(self._part.file, length, offset)
        except OSError as error:
            raise self._storage_error(error) from error
        if not data:
            raise StorageError(f"{self._part.path}: someone else cut it short while it was written")
        return data

    def check(self, verify: Callable[[Path], None]) -> None:
        """Bring the complete file to the disk and let `verify` look at it."""
        if self._part is None or self._there.total != self._size:
            raise AssertionError(f"{self._there.total} bytes were written, {self._size} were planned")
        try:
            self._join()
            ranges = self._take_unsynced()
            os.fsync(self._part.file)
            self._record(ranges)
            verify(self._part.path)
        except OSError as error:
            raise self._storage_error(error) from error

    def publish(self) -> None:
        """Give the file that was checked the target's name."""
        if self._part is None:
            raise AssertionError("there is no file to publish")
        try:
            self._part.path.replace(self._target)
            self._leave(keep=False)
            sync_folder(self._folder)
        except OSError as error:
            raise self._storage_error(error) from error

    def _create(self) -> None:
        self._part = Part.named_for(self._target)  # kept before there is a file, which is then never forgotten
        while not self._part.create():
            self._part.close(remove=True)
            self._part = Part.named_for(self._target)
        self._journal = Journal.create(self._part.journal, self._head)

    def _continue(self) -> bool:
        found = continue_part(self._target, self._head)
        if found is None:
            return False
        self._part, self._journal, self._there = found
        self.resumed_bytes = self._there.total
        return True

    def _leave(self, *, keep: bool) -> None:
        self._join()
        if keep and self._part is not None:
            self._sync_quietly(self._take_unsynced())
        if self._journal is not None:
            self._journal.close()
        if self._part is not None:
            self._part.close(remove=not keep)
        self._part = self._journal = None

    def _join(self) -> None:
        if self._sync is not None:
            self._sync.join()

    def _end_range(self) -> None:
        if self._running.start < self._running.end:
            self._unsynced.append(self._running.ended())
        self._running = RunningRange(self._running.end, self._running.end)

    def _take_unsynced(self) -> list[Range]:
        self._end_range()
        ranges, self._unsynced, self._unsynced_bytes = self._unsynced, [], 0
        return ranges

    def _sync_quietly(self, ranges: list[Range]) -> None:
        # the disk works while the next slabs are computed; an error will come again, and be told, at the end
        if self._part is None:
            return
        with contextlib.suppress(OSError):
            os.fdatasync(self._part.file) if hasattr(os, "fdatasync") else os.fsync(self._part.file)
            self._record(ranges)

    def _record(self, ranges: list[Range]) -> None:
        if self._journal is not None:
            self._journal.append(ranges)

    def _reserve(self) -> None:
        if self._part is not None and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._part.file, 0, self._size)
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise
            else:
                return
        if shutil.disk_usage(self._folder).free < self._size - self.resumed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _storage_error(self, error: OSError) -> StorageError:
        if error.errno in _NO_ROOM:
            free = shutil.disk_usage(self._folder).free
            return StorageError(
                f"{self._folder}: no room for {self._target.name}: {self._size} bytes are needed, {free} are free "
                f"({error.strerror})"
            )
        if not self._folder.is_dir():
            return StorageError(f"{self._folder}: no such folder; create it, or give another with --out")
        return StorageError(f"{self._folder}: cannot write {self._target.name}: {error.strerror or error}")


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk. Raises OSError."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
