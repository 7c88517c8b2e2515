"""Reads forward through a binary file without ever believing a length that the file cannot hold."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from app.errors import ModelFileError

_CHUNK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 29  # the largest vocabularies take some 20 MB
_MAX_ITEMS = 1 << 23  # of all arrays together; the largest vocabularies have 1.3 million


class Cursor:
    """Reads forward through a file, checking each length against what is left of it."""

    def __init__(self, file: BinaryIO, path: Path, file_size: int) -> None:
        self._file = file
        self.path = path
        self.file_size = file_size
        self._buffer = b""
        self._start = 0  # where in the file the buffer begins
        self._at = 0
        self._items = 0

    @property
    def position(self) -> int:
        """Where in the file the next byte comes from."""
        return self._start + self._at

    @property
    def left(self) -> int:
        """How many bytes of the file come after the position."""
        return self.file_size - self.position

    def refuse(self, why: str) -> ModelFileError:
        """Make the error that names the file."""
        return ModelFileError(f"{self.path}: not a usable GGUF: {why}")

    def need(self, count: int, what: str) -> int:
        """Make sure that `count` bytes are buffered and return the index where they start; moves past them."""
        if count > self.left:
            raise self.refuse(f"truncated: {what} needs {count} bytes at {self.position}, {self.left} are left")
        self._check_end(count)
        if self._at + count > len(self._buffer):
            self._start += self._at
            self._buffer = self._buffer[self._at :] + self._file.read(max(count, _CHUNK_BYTES))
            self._at = 0
            if len(self._buffer) < count:
                raise self.refuse(f"truncated while being read, at {self.position}")
        at = self._at
        self._at += count
        return at

    def take(self, count: int, what: str) -> bytes:
        """Read `count` bytes."""
        at = self.need(count, what)
        return self._buffer[at : at + count]

    def number(self, fmt: str, what: str) -> Any:
        """Read one little-endian number of a `struct` format."""
        at = self.need(struct.calcsize("<" + fmt), what)
        return struct.unpack_from("<" + fmt, self._buffer, at)[0]

    def skip(self, count: int, what: str) -> None:
        """Step over `count` bytes."""
        if count > self.left:
            raise self.refuse(f"truncated: {what} needs {count} bytes at {self.position}, {self.left} are left")
        self._check_end(count)
        position = self.position + count
        if position <= self._start + len(self._buffer):
            self._at += count
        else:
            self._file.seek(position)
            self._buffer, self._start, self._at = b"", position, 0

    def keep(self, items: int) -> None:
        """Count items of an array that will be kept in memory."""
        self._items += items
        if self._items > _MAX_ITEMS:
            raise self.refuse(f"its arrays claim {self._items} items in all; {_MAX_ITEMS} are possible")

    def _check_end(self, count: int) -> None:
        if self.position + count > _MAX_HEADER_BYTES:
            raise self.refuse(f"its header is longer than {_MAX_HEADER_BYTES} bytes")

    def string(self, what: str, limit: int) -> bytes:
        """Read a length and that many bytes, `limit` at most."""
        length = self.number("Q", what)
        if length > limit or length > self.left:
            raise self.refuse(f"{what} claims {length} bytes, {min(limit, self.left)} are possible")
        return self.take(length, what)

    def strings(self, count: int, what: str, limit: int, *, keep: bool) -> list[str]:
        """Read (or, without `keep`, step over) `count` strings: vocabularies, hence the loop over the bare buffer."""
        kept: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        done = 0
        while done < count:
            buffer, at, end = self._buffer, self._at, len(self._buffer)
            while done < count and at + 8 <= end:
                stop = at + 8 + length_at(buffer, at)[0]
                if stop > end:
                    break
                if keep:
                    kept.append(buffer[at + 8 : stop].decode(errors="surrogateescape"))
                at = stop
                done += 1
            self._at = at
            if done < count:
                text = self.string(what, limit)
                if keep:
                    kept.append(text.decode(errors="surrogateescape"))
                done += 1
        return kept
