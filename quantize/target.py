"""A planned file on its way: slabs go to their places, and what is written is checked before it gets its name."""

from __future__ import annotations

from pathlib import Path

from quantize.card import remove_card
from quantize.digest import KEPT_BYTES, FileDigest, RunningDigest
from quantize.header import aligned
from quantize.plan import Plan
from quantize.slabs import Slab
from quantize.verify import Samples, verify
from quantize.writer import AtomicFile


class Target(AtomicFile):
    """An `AtomicFile` that knows its plan.

    `run` is the identity of what is made (see `identity`), `kept_bytes` what its digest may keep in memory.
    """

    def __init__(self, plan: Plan, out: Path, run: str, *, resume: bool, kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__(out, plan.file_size, run, resume=resume)
        self.out = out
        self.digest: FileDigest | None = None
        self._plan, self._samples = plan, Samples()
        self._hashing = RunningDigest(plan, self.read_back, kept_bytes)
        self._begun = False

    def has_slab(self, slab: Slab) -> bool:
        """Tell whether a slab, and the padding behind it, is there already."""
        start = self._place(slab)
        return self.has(start, start + slab.nbytes + _padding(slab))

    def write(self, slab: Slab, data: memoryview) -> None:
        """Put a slab's bytes where they belong, and the padding behind a tensor's last."""
        self._begin()
        start = self._place(slab)
        self._samples.take(start, data)
        self.write_at(start, data)
        if padding := _padding(slab):
            self.write_at(start + len(data), memoryview(bytes(padding)))

    def check_plan(self) -> None:
        """Bring the complete file to the disk and compare it with the plan."""
        self._begin()
        self.check(self._look_at)

    def write_at(self, offset: int, data: memoryview) -> None:
        """Put bytes at an offset, and into the digest."""
        super().write_at(offset, data)
        self._hashing.take(offset, data)

    def publish(self) -> None:
        """Give the file its name; the card of the one that it replaces goes before, never to be taken for its own."""
        remove_card(self.out)
        super().publish()

    def _look_at(self, part: Path) -> None:
        verify(part, self._plan, self._samples)
        self.digest = self._hashing.finish()

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        self._hashing.take_written(self.there)
        header = memoryview(self._plan.header)
        if not self.has(0, len(header)):
            self.write_at(0, header)

    def _place(self, slab: Slab) -> int:
        return len(self._plan.header) + slab.tensor.offset + slab.offset


def _padding(slab: Slab) -> int:
    return aligned(slab.tensor.nbytes) - slab.tensor.nbytes if slab.is_last else 0
