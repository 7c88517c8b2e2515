"""Prefixes on disk: files of one model, one library build and one kind of cache, written whole or not at all.

A file is a line of JSON (tokens, scope, bytes and digest of the state), then the state. What is torn, foreign or
damaged is never used, and removed. The folder is its user's alone; the oldest files go when it grows over its limit.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.worker.prefix_store import StoredPrefix

if TYPE_CHECKING:
    from app.worker.prefix_store import State

_SUFFIX = ".prefix"
_PART = ".part"
_LONGEST_HEAD = 1 << 24
_FILE_OF_SEVERAL = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class PrefixFiles:
    """A folder of prefixes, with one thread that reads and writes. Its callbacks run on that thread."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Use (and make) the folder; at most `limit` bytes are kept. Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._folder = folder
        self._limit = limit
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="prefix files", daemon=True).start()

    def known(self) -> Iterator[StoredPrefix]:
        """Yield the prefixes that are there, the oldest first, without their states."""
        for part in self._folder.glob(f"*{_PART}"):
            _remove(part)
        for path in self._by_age():
            try:
                with path.open("rb") as file:
                    head = _read_head(file)
                tokens = np.array(head["tokens"], np.int32)
                yield StoredPrefix(tokens, head["scope"], head["bytes"], file=path.name)
            except (OSError, ValueError, KeyError, TypeError):
                _remove(path)

    def write(self, entry: StoredPrefix, state: State) -> None:
        """Write a prefix, later; its `file` is set at once. A full disk costs the file, nothing else."""
        entry.file = secrets.token_hex(16) + _SUFFIX
        self._jobs.put(lambda: self._write(entry, state))

    def read(self, entry: StoredPrefix, done: Callable[[StoredPrefix, State | None], None]) -> None:
        """Read a prefix's state, later; `done` gets it, or None if it is not there or damaged."""
        self._jobs.put(lambda: done(entry, self._read(entry)))

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    def _write(self, entry: StoredPrefix, state: State) -> None:
        assert entry.file is not None  # noqa: S101 - set by `write`
        head: dict[str, Any] = {"tokens": entry.tokens.tolist(), "scope": entry.scope, "bytes": len(state)}
        head["digest"] = _digest(state)
        part = self._folder / (entry.file + _PART)
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(json.dumps(head).encode() + b"\n")
                file.write(state.data)
            part.rename(self._folder / entry.file)
        except OSError:
            _remove(part)
        self._shrink()

    def _read(self, entry: StoredPrefix) -> State | None:
        path = self._folder / (entry.file or "")
        state: State | None = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, MemoryError), path.open("rb") as file:
            head = _read_head(file)
            found = np.empty(head["bytes"], np.uint8)
            if file.readinto(found.data) == len(found) and _digest(found) == head["digest"]:
                state = found
        if state is None:
            _remove(path)
        else:
            with contextlib.suppress(OSError):
                os.utime(path)
        return state

    def _by_age(self) -> list[Path]:
        found: list[tuple[float, Path]] = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path))
        return [path for _, path in sorted(found)]

    def _shrink(self) -> None:
        sizes = {}
        for path in self._by_age():
            with contextlib.suppress(OSError):
                sizes[path] = path.stat().st_size
        total = sum(sizes.values())
        for path, size in sizes.items():
            if total <= self._limit:
                return
            _remove(path)
            total -= size


def model_identity(path: Path, *others: str) -> str:
    """Return a name for a model file's content with a library build and settings: equal only if states fit.

    Of a large file, pieces that are spread over it are looked at; of one in parts, all parts.
    """
    digest = hashlib.sha256("\n".join(others).encode())
    for part in _parts(path):
        size = part.stat().st_size
        digest.update(f"\n{size}\n".encode())
        with part.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * number // max(_SAMPLES - 1, 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _parts(path: Path) -> list[Path]:
    """Return the files of a model, `NAME-00001-of-00003.gguf` and its fellows, or the one there is."""
    if (match := _FILE_OF_SEVERAL.search(path.name)) is None:
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(path.name[: match.start()])}-?????-of-{match[1]}.gguf"))


def _read_head(file: Any) -> dict[str, Any]:
    line = file.readline(_LONGEST_HEAD)
    head = json.loads(line)
    size = os.fstat(file.fileno()).st_size
    if not isinstance(head, dict) or size != len(line) + head["bytes"]:
        raise ValueError("not whole")
    return head


def _digest(state: State) -> str:
    return hashlib.blake2b(state.data, digest_size=16).hexdigest()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
