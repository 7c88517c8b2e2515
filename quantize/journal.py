"""The journal of an unfinished file: which of its ranges are on the disk, and their checksums.

It is a text file beside the temporary one: a line for the run that it belongs to, then a line for each range, appended
once the range has been brought to the disk. Each line carries its own checksum, and nothing behind one that is damaged
or cut off counts. A range counts only while the temporary file still holds the bytes that the checksum was made of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import msgspec

_MAX_BYTES = 1 << 26
_READ_BYTES = 1 << 20


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a journal belongs to: the identity of the run (see `identity`) and the size of the whole file in bytes."""

    run: str
    size: int


class Range(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The bytes `start ≤ position < end` of the file, and their CRC-32."""

    start: int
    end: int
    crc: int


@dataclasses.dataclass
class RunningRange:
    """A range that grows while bytes are written one after the other."""

    start: int = 0
    end: int = 0
    crc: int = 0

    def extend(self, data: memoryview) -> None:
        """Take in the bytes that follow."""
        self.crc = zlib.crc32(data, self.crc)
        self.end += len(data)

    def ended(self) -> Range:
        """Return what has been taken in."""
        return Range(self.start, self.end, self.crc)


class Journal:
    """A journal that is open for appending. A disk that takes no more of it only makes less of the work resumable."""

    def __init__(self, file: int) -> None:
        self._file = file

    @classmethod
    def create(cls, path: Path, head: Head) -> Self:
        """Begin the journal of a new file. Raises `OSError`."""
        journal = cls(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666))
        journal._append([head])
        return journal

    @classmethod
    def reopen(cls, path: Path, head: Head) -> tuple[Self, list[Range]] | None:
        """Go on with a journal and return its ranges, or None if it is damaged at its head or another run's."""
        file = -1
        try:
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            ranges, sound = _parse(_content(file), head)
            if sound:
                os.ftruncate(file, sound)  # what comes next must not be glued to a line that was cut off
                return cls(file), ranges
        except OSError:
            pass
        if file >= 0:
            os.close(file)
        return None

    def append(self, ranges: Iterable[Range]) -> None:
        """Record ranges that are on the disk."""
        with contextlib.suppress(OSError):
            self._append(ranges)

    def close(self) -> None:
        """Let go of the journal."""
        os.close(self._file)

    def _append(self, lines: Iterable[Head | Range]) -> None:
        text = b"".join(_line(msgspec.json.encode(line)) for line in lines)
        if text:
            os.write(self._file, text)
            os.fsync(self._file)


def holds(file: int, known: Range) -> bool:
    """Tell whether a file still holds the bytes that a range was made of."""
    position, crc = known.start, 0
    try:
        while position < known.end:
            data = os.pread(file, min(_READ_BYTES, known.end - position), position)
            if not data:
                return False
            crc = zlib.crc32(data, crc)
            position += len(data)
    except OSError:
        return False
    return crc == known.crc


def _line(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _content(file: int) -> bytes:
    content = b""
    while len(content) < _MAX_BYTES and (more := os.read(file, _READ_BYTES)):
        content += more
    return content


def _parse(content: bytes, head: Head) -> tuple[list[Range], int]:
    """Return the ranges, and how many bytes of the journal are sound: none if it is not this run's."""
    ranges: list[Range] = []
    sound = 0
    for line in content.splitlines(keepends=True):
        text = line[9:-1]
        if line != _line(text):
            break
        try:
            if sound == 0:
                if msgspec.json.decode(text, type=Head) != head:
                    break
            else:
                ranges.append(_checked(msgspec.json.decode(text, type=Range), head.size))
        except ValueError:  # also msgspec's errors
            break
        sound += len(line)
    return ranges, sound


def _checked(known: Range, size: int) -> Range:
    if not 0 <= known.start < known.end <= size:
        raise ValueError("a range outside of the file")
    return known
