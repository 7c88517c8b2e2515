"""A folder of a run's own, beside its result and on the same disk. It goes with the run, or with the next one.

A lock tells the folder of a running process from that of one that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from pathlib import Path
from typing import Self

from app.errors import StorageError

_SUFFIX = ".pestle-work"
_LOCK = "lock"


class Workplace:
    """A context manager; `folder` is there, and empty but for a lock, until it ends."""

    def __init__(self, target: Path) -> None:
        """Prepare the folder for the run that makes `target`; if its own folder is yet to be made, further up."""
        target = target.expanduser().absolute()
        self._parent = next(folder for folder in target.parents if folder.is_dir())
        self._name = f".{target.name}.{secrets.token_hex(8)}"
        self.folder = self._parent / (self._name + _SUFFIX)
        self._lock = -1

    def __enter__(self) -> Self:
        """Make the folder. Raises `StorageError`."""
        fresh = self._parent / self._name  # takes the name that `sweep` looks for when its lock is held
        try:
            fresh.mkdir(mode=0o700)
            try:
                self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fresh.rename(self.folder)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                self.__exit__()
                raise
        except OSError as error:
            raise StorageError(f"{self._parent}: no folder can be made here: {error.strerror or error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep(target: Path) -> None:
    """Remove the folders of runs that were to make `target` and whose process is gone."""
    parent = next((folder for folder in target.expanduser().absolute().parents if folder.is_dir()), None)
    for folder in parent.iterdir() if parent else ():
        if folder.name.startswith(f".{target.name}.") and folder.name.endswith(_SUFFIX):
            if not (folder / _LOCK).exists():
                shutil.rmtree(folder, ignore_errors=True)  # its removal was cut short
                continue
            with contextlib.suppress(OSError):
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)
