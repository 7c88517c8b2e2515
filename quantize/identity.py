"""Says what the bytes of a file follow from, so that a run goes on only with what it would have made itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import StorageError
from app.llama.library import build_name

if TYPE_CHECKING:
    from quantize.prepared import Prepared


def identities(prepared: Prepared) -> list[str]:
    """Return for each file of a run the sha256 of all that its content follows from.

    That is its header (which holds vocabulary, types and places), config.json, the names, sizes and times of the
    files with weights and of the importance matrix, and the builds of Pestle and of llama.cpp. Raises `StorageError`.
    """
    common = hashlib.sha256(prepared.source.read_bytes("config.json") or b"")
    for line in (version("pestle"), build_name(), str(prepared.through_bf16), *_sources(prepared)):
        common.update(line.encode(errors="surrogateescape") + b"\0")
    found = []
    for output in prepared.outputs:
        digest = common.copy()
        digest.update(output.plan.header)
        found.append(digest.hexdigest())
    return found


def _sources(prepared: Prepared) -> Iterator[str]:
    paths: list[Path] = []
    for shard in prepared.checkpoint.shards:
        if stated := prepared.checkpoint.stated(shard):
            yield f"{shard.name} {stated}"
        else:
            paths.append(shard)
    if prepared.importance is not None:
        paths.append(prepared.importance.path)
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
        yield f"{path.name} {status.st_size} {status.st_mtime_ns}"
