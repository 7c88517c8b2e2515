"""Makes the card of a file from the run that made it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Sequence
from pathlib import Path

from app.errors import StorageError
from app.llama.library import build_name
from app.models.card import Card, FileIdentity, Imatrix, QuantizedFile, Recipe, Source, Tensor
from quantize.importance import ImportanceMatrix
from quantize.pipeline import Result
from quantize.prepared import Output, Prepared

_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the source as it was when the run began."""

    path: Path
    bytes: int
    modified: int
    is_weights: bool
    stated_sha256: str | None = None
    is_here: bool = True

    @classmethod
    def look_at(cls, path: Path, *, is_weights: bool, stated: tuple[int, str | None] | None = None) -> SourceFile:
        """Remember a file's size and time, or what is stated of one that is not here. Raises `StorageError`."""
        if stated is not None:
            return cls(path, stated[0], 0, is_weights, stated[1], is_here=False)
        try:
            status = path.stat()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
        return cls(path, status.st_size, status.st_mtime_ns, is_weights)

    @property
    def known_sha256(self) -> str | None:
        """The digest that the Hub's cache calls the file by, and that was checked when it was fetched."""
        if not self.is_here:
            return self.stated_sha256
        name = self.path.resolve().name
        return name if self.path.is_symlink() and _SHA256.fullmatch(name) else None

    def identity(self, *, hashed: bool) -> FileIdentity:
        """Return the card's line; `hashed` reads weights again if their digest is not known. Raises `StorageError`."""
        digest = self.known_sha256
        if digest is None and self.is_here and (hashed or not self.is_weights):
            digest = sha256_of(self.path)
            if SourceFile.look_at(self.path, is_weights=self.is_weights) != self:
                digest = None  # someone has changed it since
        return FileIdentity(name=_readable(self.path.name), bytes=self.bytes, sha256=digest)


def source_files(prepared: Prepared) -> list[SourceFile]:
    """Look at what a run reads, before it begins: the weights, and the small files that are there."""
    shards = prepared.checkpoint.shards
    weights = [SourceFile.look_at(path, is_weights=True, stated=prepared.checkpoint.stated(path)) for path in shards]
    if prepared.source.kind == "gguf":
        return weights
    small = [prepared.source.folder / name for name in _SMALL_FILES]
    return weights + [SourceFile.look_at(path, is_weights=False) for path in small if path.is_file()]


def describe_source(prepared: Prepared, files: Sequence[SourceFile], *, hashed: bool) -> Source:
    """Return what the card says of the source; `hashed` reads the weights of a folder for their digests."""
    source = prepared.source
    name = files[0].path.name if source.kind == "gguf" else source.repository or source.folder.name
    return Source(
        kind=source.kind,
        name=_readable(name),
        revision=source.commit if source.commit and _COMMIT.fullmatch(source.commit) else None,
        files=[file.identity(hashed=hashed) for file in files],
    )


def make_card(prepared: Prepared, output: Output, result: Result, source: Source) -> Card:
    """Return the card of a file that a run has made, without quality. Raises `StorageError`."""
    plan, digest, overrides = output.plan, result.digest, prepared.overrides
    file = QuantizedFile(
        name=_readable(result.path.name),
        bytes=plan.file_size,
        sha256=digest.sha256,
        header_bytes=len(plan.header),
        header_sha256=digest.header,
    )
    recipe = Recipe(
        overrides=list(overrides.tensors),
        output=overrides.output,
        embedding=overrides.embedding,
        imatrix=_describe_imatrix(prepared.importance) if output.recipe.quantized else None,
        allow_requantize=prepared.allow_requantize,
    )
    tensors = [
        Tensor(
            name=tensor.spec.name,
            type=tensor.type_name,
            shape=tensor.spec.shape,
            bytes=tensor.nbytes,
            sha256_through=through,
            relative_error=None if result.losses is None else result.losses.relative_error(tensor.spec.name),
        )
        for tensor, through in zip(plan.tensors, digest.through, strict=True)
    ]
    return Card(
        file=file,
        type=result.type_name,
        recipe=recipe,
        source=source,
        library=build_name(),
        pestle=importlib.metadata.version("pestle"),
        made=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        weights=result.weights,
        bits_per_weight=8 * plan.file_size / result.weights,
        tensors=tensors,
    )


def sha256_of(path: Path) -> str:
    """Return a file's digest in hex. Raises `StorageError`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _readable(name: str) -> str:
    # names on the disk need not be UTF-8, JSON must be
    return os.fsencode(name).decode(errors="replace")


def _describe_imatrix(matrix: ImportanceMatrix | None) -> Imatrix | None:
    return None if matrix is None else Imatrix(name=_readable(matrix.path.name), sha256=sha256_of(matrix.path))
