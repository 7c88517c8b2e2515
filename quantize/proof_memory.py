"""Remembers which vocabularies are proven, so that a model's next type, or its next run, need not prove them again.

A file in the cache folder, named by the digest of all that a proof depends on, holds what people were told of it. What
cannot be kept or read is proven again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from importlib.metadata import version
from pathlib import Path

from app.config import ServeSettings, cache_folder

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_MOST_BYTES = 1 << 28


def files_digest(folder: Path) -> bytes:
    """Return the sha256 of a model's tokenizer files and of the versions of what reads them."""
    digest = hashlib.sha256()
    for package in ("pestle", "llama-cpp-python", "tokenizers", "sentencepiece"):
        digest.update(f"{package} {version(package)}\n".encode())
    for name in FILES:
        path = folder / name
        content = path.read_bytes() if path.is_file() and path.stat().st_size <= _MOST_BYTES else None
        digest.update(f"{name} {None if content is None else len(content)}\n".encode() + (content or b""))
    return digest.digest()


def is_familiar(folder: Path) -> bool:
    """Tell whether something was proven of a model folder's tokenizer before; a guess at what `recall` will say."""
    try:
        return (_folder() / files_digest(folder).hex()).is_file()
    except OSError:
        return False


def recall(files: bytes, proof: bytes) -> tuple[str, ...] | None:
    """Return what people should know of a proof that was done before, None if it was not."""
    try:
        content = json.loads((_folder() / f"{files.hex()}-{proof.hex()}").read_bytes())
        return tuple(str(note) for note in content["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(files: bytes, proof: bytes, notes: tuple[str, ...]) -> None:
    """Remember a proof that has succeeded."""
    with contextlib.suppress(OSError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{secrets.token_hex(8)}"
        part.write_text(json.dumps({"notes": notes}), encoding="utf-8")
        part.replace(folder / f"{files.hex()}-{proof.hex()}")
        (folder / files.hex()).touch()


def _folder() -> Path:
    return cache_folder(ServeSettings(cache_dir=os.environ.get("LLM_CACHE_DIR", ""))) / "proofs"
