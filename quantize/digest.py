"""The sha256 of a file that is being written, and of its beginnings up to the end of each tensor.

What comes in the file's order is hashed on its way and never read again. Where a write does not follow the one before
(files of several types can have several orders), the rest is read once the file is complete, from the page cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from quantize.plan import Plan

_AT_ONCE = 1 << 22


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
    """Follows the writes of one file."""

    def __init__(self, plan: Plan) -> None:
        start = len(plan.header)
        self._marks = [start, *(start + tensor.offset + tensor.nbytes for tensor in plan.tensors)]
        self._size = plan.file_size
        self._found: list[str] = []
        self._position = 0
        self._hash = hashlib.sha256()

    def take(self, offset: int, data: memoryview) -> None:
        """Hear that bytes were written at an offset."""
        if offset != self._position:
            return  # `finish` will read them
        while data:
            is_marked = len(self._found) < len(self._marks)
            room = self._marks[len(self._found)] - self._position if is_marked else len(data)
            piece = data[:room]
            self._hash.update(piece)  # lets go of the GIL
            self._position += len(piece)
            data = data[room:]
            while len(self._found) < len(self._marks) and self._position == self._marks[len(self._found)]:
                self._found.append(self._hash.copy().hexdigest())

    def finish(self, path: Path) -> FileDigest:
        """Read what did not come in order from the complete file. Raises OSError."""
        if self._position < self._size:
            with path.open("rb") as file:
                file.seek(self._position)
                while piece := file.read(_AT_ONCE):
                    self.take(self._position, memoryview(piece))
        return FileDigest(self._hash.hexdigest(), self._found[0], tuple(self._found[1:]))
