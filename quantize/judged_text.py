"""The text over which a model is judged: the user's, or the one that we bring."""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import resources
from pathlib import Path

from app.errors import StorageError, UsageError

OWN_TEXT = "everyday.txt"


@dataclasses.dataclass(frozen=True, slots=True)
class JudgedText:
    """A text and its name, as people are told it."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """The digest of its UTF-8 bytes, in hex."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def open_text(path: Path | None) -> JudgedText:
    """Read a file's text, or ours. Raises `UsageError` if it is not UTF-8, `StorageError` if it cannot be read."""
    if path is None:
        content = resources.files("quantize").joinpath("texts", OWN_TEXT).read_bytes().decode()
        return JudgedText(f"Pestle's {OWN_TEXT}", content)
    try:
        return JudgedText(path.name, path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: {error}", param="text") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
