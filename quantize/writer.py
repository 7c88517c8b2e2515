"""Writes a file that is either whole or not there.

The bytes go to a temporary file in the target's folder, whose room is reserved first; it takes the target's name only
when it is complete, on the disk and verified. A lock tells the temporary file of a running process from a dead one's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from app.errors import StorageError

_SUFFIX = ".pestle-part"
_SYNC_BYTES = 1 << 26
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}


class AtomicFile:
    """A context manager: `write_at` every byte once, `check`, then `publish`; else it leaves nothing behind."""

    def __init__(self, target: Path, size: int) -> None:
        self._target = target
        self._size = size
        self._folder = target.parent
        self._part: Path | None = None
        self._file = -1
        self._written = 0
        self._synced = 0
        self._sync: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Create the temporary file and reserve its room. Raises `StorageError` that names the folder and the need."""
        try:
            sweep(self._target)
            self._part = self._folder / f".{self._target.name}.{secrets.token_hex(8)}{_SUFFIX}"
            self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._reserve()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise self._storage_error(error) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the temporary file, unless it was committed."""
        if self._sync is not None:
            self._sync.join()
        if self._part is not None:
            with contextlib.suppress(OSError):
                self._part.unlink()
            self._part = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def write_at(self, offset: int, data: memoryview) -> None:
        """Put bytes where they belong; the order does not matter."""
        try:
            while data:
                written = os.pwrite(self._file, data, offset)
                self._written += written
                offset += written
                data = data[written:]
        except OSError as error:
            raise self._storage_error(error) from error
        if self._written - self._synced >= _SYNC_BYTES and (self._sync is None or not self._sync.is_alive()):
            self._synced = self._written
            self._sync = threading.Thread(target=self._sync_quietly, daemon=True)
            self._sync.start()

    def check(self, verify: Callable[[Path], None]) -> None:
        """Bring the complete file to the disk and let `verify` look at it."""
        if self._part is None or self._written != self._size:
            raise AssertionError(f"{self._written} bytes were written, {self._size} were planned")
        try:
            os.fsync(self._file)
            verify(self._part)
        except OSError as error:
            raise self._storage_error(error) from error

    def publish(self) -> None:
        """Give the file that was checked the target's name."""
        if self._part is None:
            raise AssertionError("there is no file to publish")
        try:
            self._part.replace(self._target)
            self._part = None
            sync_folder(self._folder)
        except OSError as error:
            raise self._storage_error(error) from error

    def _sync_quietly(self) -> None:
        # the disk works while the next slabs are computed; an error will come again, and be told, at the end
        with contextlib.suppress(OSError):
            os.fdatasync(self._file) if hasattr(os, "fdatasync") else os.fsync(self._file)

    def _reserve(self) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file, 0, self._size)
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise
            else:
                return
        if shutil.disk_usage(self._folder).free < self._size:
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


def sweep(target: Path) -> None:
    """Remove temporary files of this target whose process is gone."""
    if not target.parent.is_dir():
        return
    for part in target.parent.iterdir():
        if part.name.startswith(f".{target.name}.") and part.name.endswith(_SUFFIX):
            with contextlib.suppress(OSError):
                file = os.open(part, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                    part.unlink()
                finally:
                    os.close(file)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk. Raises OSError."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
