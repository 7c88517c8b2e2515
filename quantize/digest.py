"""The sha256 of a file that is being written, and of its beginnings up to the end of each tensor.

What comes in the file's order is hashed on its way. What comes ahead of its turn (gates and ups by turns, files of
several types with several orders) is kept in memory as far as there is room, and beyond that read back from the file
when its turn comes, which is soon enough for the page cache to have it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable

from quantize.extents import Extents
from quantize.plan import Plan

KEPT_BYTES = 1 << 28
"""How much a run keeps in memory of what comes ahead of its turn."""

_AT_ONCE = 1 << 22

ReadBack = Callable[[int, int], bytes]
"""Called with an offset and how many bytes are wanted; gives at least one."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileDigest:
    """Lower-case hex: of the whole file, of its header, and through the last byte of each tensor in the plan's order.

    A digest through a tensor costs nothing (it is the running one, copied), and in a damaged file the first that
    differs names the tensor.
    """

    sha256: str
    header: str
    through: tuple[str, ...]


class RunningDigest:
    """Follows the writes of one file; keeps at most `kept_bytes` in memory."""

    def __init__(self, plan: Plan, read_back: ReadBack, kept_bytes: int = KEPT_BYTES) -> None:
        start = len(plan.header)
        self._marks = [start, *(start + tensor.offset + tensor.nbytes for tensor in plan.tensors)]
        self._size = plan.file_size
        self._found: list[str] = []
        self._position = 0
        self._hash = hashlib.sha256()
        self._read_back = read_back
        self._room = kept_bytes
        self._kept: dict[int, bytes] = {}
        self._ahead = Extents()

    def take(self, offset: int, data: memoryview) -> None:
        """Hear that bytes were written at an offset. Raises what `read_back` does."""
        if offset != self._position:
            self._ahead.add(offset, offset + len(data))
            if len(data) <= self._room:
                self._kept[offset] = bytes(data)
                self._room -= len(data)
            return
        self._update(data)
        self._catch_up()

    def take_written(self, written: Iterable[tuple[int, int]]) -> None:
        """Hear which ranges an earlier run had written. Raises what `read_back` does."""
        for start, end in written:
            self._ahead.add(start, end)
        self._catch_up()

    def finish(self) -> FileDigest:
        """Return the digests of the complete file."""
        if self._position != self._size:
            raise AssertionError(f"{self._position} bytes of {self._size} were heard of")
        return FileDigest(self._hash.hexdigest(), self._found[0], tuple(self._found[1:]))

    def _catch_up(self) -> None:
        while length := self._ahead.run_from(self._position):
            kept = self._kept.pop(self._position, None)
            if kept is None:
                self._update(memoryview(self._read_back(self._position, self._unkept(length))))
            else:
                self._room += len(kept)
                self._update(memoryview(kept))

    def _unkept(self, length: int) -> int:
        """Return how much to read of the bytes that are there: up to the next that is kept."""
        length = min(length, _AT_ONCE)
        return min((at - self._position for at in self._kept if 0 < at - self._position < length), default=length)

    def _update(self, data: memoryview) -> None:
        while data:
            is_marked = len(self._found) < len(self._marks)
            room = self._marks[len(self._found)] - self._position if is_marked else len(data)
            piece = data[:room]
            self._hash.update(piece)  # lets go of the GIL
            self._position += len(piece)
            data = data[room:]
            while len(self._found) < len(self._marks) and self._position == self._marks[len(self._found)]:
                self._found.append(self._hash.copy().hexdigest())
