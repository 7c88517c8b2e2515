"""Writes the card beside a quantized file: `FILE.card.json` for programs, `FILE.card.md` for people."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import msgspec

from app.errors import StorageError
from app.models.card import PLOT_SUFFIX, SUFFIX, TEXT_SUFFIX, Card, card_path


def write_card(card: Card, file: Path) -> Path:
    """Put a card beside its file, atomically; returns its path. Raises `StorageError`."""
    path = card_path(file)
    write_whole(path, msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n")
    return path


def remove_card(file: Path) -> None:
    """Take away everything that a card put beside a file, before the file is replaced. Raises `StorageError`."""
    for suffix in (SUFFIX, TEXT_SUFFIX, PLOT_SUFFIX):
        path = file.with_name(file.name + suffix)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{path}: the old card cannot be removed: {error.strerror or error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all. Raises `StorageError`."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
