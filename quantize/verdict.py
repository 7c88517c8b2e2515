"""What looking at a finished file found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

HEADER, TENSOR, FILE = "header", "tensor", "file"


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as it should be: in the header, in a tensor (`name` is its), or in the file as a whole.

    `judge` is what says so: `structure`, `card` or `source`.
    """

    judge: str
    place: str
    message: str
    name: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What was compared, and every difference that was found; `sha256` is None for a file whose header is damaged."""

    path: Path
    file_size: int
    judges: tuple[str, ...]
    differences: tuple[Difference, ...]
    sha256: str | None = None

    @property
    def content_judged(self) -> bool:
        """Whether anything said what the weights should be."""
        return "card" in self.judges or "source" in self.judges
