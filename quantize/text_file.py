"""The texts that models are measured over: a file of the user's, or one that the package brings."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from app.errors import StorageError, UsageError


def read_text(path: Path | None, ours: str) -> tuple[str, str]:
    """Return a file's text and what to call it; without a file, that of our own text of this name.

    Raises UsageError for a file that is not UTF-8, StorageError for one that can't be read.
    """
    if path is None:
        text = resources.files("quantize").joinpath("texts", ours).read_bytes()
        return text.decode(), f"Pestle's {ours}"
    try:
        return path.read_bytes().decode(), str(path)  # line ends as they are: they are tokens
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: {error}", param="text") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
