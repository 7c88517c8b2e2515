"""Where a model comes from: a folder with safetensors and their JSON files, or a repository of the Hub."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

from app.errors import BadInputError, CheckpointError, StorageError
from app.models import hub
from quantize.bounded_json import decode_json

_MAX_JSON_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's folder; reads its small files, each once."""

    folder: Path
    notes: list[str] = dataclasses.field(default_factory=list, compare=False)
    """What people should know of the model or of its conversion, a line each; families add to it."""
    kind: Literal["folder", "hub", "gguf"] = "folder"
    repository: str | None = None
    """`org/name` for a model on the Hub."""
    commit: str | None = None
    """The commit of a model on the Hub."""

    @property
    def name(self) -> str:
        """The model's name: that of its folder, or of its repository without the organization."""
        return self.folder.name if self.repository is None else self.repository.partition("/")[2]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises `CheckpointError` if it is missing."""
        config = self.read_object("config.json")
        if config is None:
            raise CheckpointError(f"{self.folder}: no config.json; it says which model the weights belong to")
        return config

    @functools.cached_property
    def tokenizer(self) -> dict[str, Any] | None:
        """The content of tokenizer.json, if there is one."""
        return self.read_object("tokenizer.json")

    @functools.cached_property
    def tokenizer_config(self) -> dict[str, Any] | None:
        """The content of tokenizer_config.json, if there is one."""
        return self.read_object("tokenizer_config.json")

    def read_object(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in a file of the folder, or None if there is no such file."""
        text = self.read_bytes(name)
        if text is None:
            return None
        try:
            content = decode_json(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.folder / name}: not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.folder / name}: a JSON object was expected, not {type(content).__name__}")
        return content

    def read_text(self, name: str) -> str | None:
        """Return the text of a file of the folder, or None if there is no such file."""
        content = self.read_bytes(name)
        try:
            return None if content is None else content.decode().replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.folder / name}: not UTF-8: {error}") from error

    def read_bytes(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if there is no such file. Raises `CheckpointError` if it is absurdly large."""
        path = self.folder / name
        try:
            if not path.is_file():
                return None
            if path.stat().st_size > _MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: {path.stat().st_size} bytes; at most {_MAX_JSON_BYTES} are read")
            return path.read_bytes()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def open_source(path: Path) -> Source:
    """Return the source at a path, or that of a model on the Hub, `org/name[@revision]`, whose files are fetched.

    Raises `BadInputError` that says what was found instead of a model's folder, and what `hub.fetch` raises.
    """
    if path.is_file():
        raise BadInputError(f"{path}: a file; give the folder that holds config.json and the safetensors")
    if path.is_dir():
        return Source(path.absolute())  # not resolved: the name of a linked folder says more than its target's
    model = hub.parse(str(path))
    if model is None:
        raise BadInputError(f"{path}: no such folder")
    folder = hub.fetch(model)  # which the Hub's cache calls by the commit
    return Source(folder, kind="hub", repository=model.repo, commit=folder.name)
