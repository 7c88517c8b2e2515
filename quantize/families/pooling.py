"""How the embeddings of a text's tokens become one: what the files of sentence-transformers say about it."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from app.errors import CheckpointError
from quantize.families.config import Config
from quantize.header import KeyTable
from quantize.source import Source

_MODES = {"mean": 1, "cls": 2, "lasttoken": 3}  # llama.cpp's llama_pooling_type
_SWITCHES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}


def set_pooling(keys: KeyTable, architecture: str, config: Config, source: Source) -> None:
    """Set the pooling of the embeddings, and that of the classification head if config.json names one.

    A checkpoint without modules.json has no pooling of its own. Dense layers after the pooling are named and left out.
    Raises `CheckpointError` for a pooling that llama.cpp does not have, and for files that are damaged or missing.
    """
    modules = _modules(source)
    folder = next((path for path, kind in modules if kind.endswith("Pooling")), None)
    if folder is not None:
        keys.u32(f"{architecture}.pooling_type", _MODES[_mode(source, f"{folder}/config.json")])
    source.notes.extend(
        f"left out: {path} (sentence-transformers' layer after the pooling, which upstream leaves out by default)"
        for path, kind in modules
        if kind.endswith("Dense")
    )
    head = config.fields.get("classifier_pooling")
    if head is not None:
        if head not in {"mean", "cls"}:
            raise CheckpointError(f"{config.path}: classifier_pooling is {head!r}; known are cls and mean")
        keys.u32(f"{architecture}.classifier.pooling_type", _MODES[head])


def _modules(source: Source) -> list[tuple[PurePosixPath, str]]:
    """Return folder and type of each module of sentence-transformers."""
    path, content = source.folder / "modules.json", source.read_bytes("modules.json")
    if content is None:
        return []
    try:
        modules = [(PurePosixPath(module["path"]), str(module["type"])) for module in json.loads(content)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a list of modules with type and path: {error!r}") from error
    for folder, _ in modules:
        if folder.is_absolute() or ".." in folder.parts:
            raise CheckpointError(f"{path}: {str(folder)!r} is not a folder inside of the model's")
    return modules


def _mode(source: Source, name: str) -> str:
    pooling = source.read_object(name)
    if pooling is None:
        raise CheckpointError(f"{source.folder / name}: missing, although modules.json names its folder")
    mode = next((mode for switch, mode in _SWITCHES.items() if pooling.get(switch)), pooling.get("pooling_mode"))
    if not isinstance(mode, str) or mode not in _MODES:
        chosen = [switch for switch, value in pooling.items() if switch.startswith("pooling_mode") and value]
        found = mode or ", ".join(chosen) or "none"
        raise CheckpointError(f"{source.folder / name}: the pooling is {found}; llama.cpp has {', '.join(_MODES)}")
    return mode
