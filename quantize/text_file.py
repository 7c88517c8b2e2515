"""A text over which a model is run: the user's, or one that we bring."""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import resources
from pathlib import Path

from app.errors import StorageError, UsageError

JUDGED_TEXT = "everyday.txt"  # over which models are judged
CALIBRATION_TEXT = "calibration.txt"  # over which importance is measured


@dataclasses.dataclass(frozen=True, slots=True)
class NamedText:
    """A text and its name, as people are told it."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """The digest of its UTF-8 bytes, in hex."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def open_text(path: Path | None, own: str = JUDGED_TEXT) -> NamedText:
    """Read a file's text, or ours. Raises `UsageError` if it is not UTF-8, `StorageError` if it cannot be read."""
    if path is None:
        content = resources.files("quantize").joinpath("texts", own).read_bytes().decode()
        return NamedText(f"Pestle's {own}", content)
    try:
        return NamedText(path.name, path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: {error}", param="text") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
