"""What the encoders of the BERT line share: keys, classification heads, and names that vary between checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from app.errors import CheckpointError
from app.models.gguf_types import ValueType
from quantize.checkpoint import StoredTensor
from quantize.families.common_keys import set_common_keys
from quantize.families.config import Config
from quantize.families.mapping import Want, map_tensors
from quantize.families.pooling import set_pooling
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec


def read_config(source: Source, defaults: Mapping[str, Mapping[str, Any]]) -> Config:
    """Read config.json, where a null that it states counts as no value even if the config class has a default."""
    stated = source.config
    known = {
        kind: {name: value for name, value in values.items() if name not in stated} for kind, values in defaults.items()
    }
    return Config(source, known)


def head_count(config: Config, name: str, hidden: int) -> int:
    """Return the number of attention heads. Raises `CheckpointError` if the hidden size is no multiple of it."""
    heads = config.count(name)
    if hidden % heads:
        raise CheckpointError(f"{config.path}: {name} is {heads}; it does not divide the hidden size {hidden}")
    return heads


def check_activation(config: Config, name: str, known: tuple[str, ...]) -> None:
    """Raise `CheckpointError` if the feed-forward layers have another activation than llama.cpp computes."""
    found = config.fields.get(name)
    if found not in known:
        raise CheckpointError(f"{config.path}: {name} is {found!r}; llama.cpp computes {', '.join(known)} here")


def class_names(config: Config, *, unnamed: int = 2) -> list[str]:
    """Return the names of the classes that the model tells apart; an empty list if it is no named classifier.

    `unnamed` is how many classes are taken for granted where config.json is silent; two such are no classifier.
    """
    stated = config.fields.get("id2label")
    if stated is None:
        names = [f"LABEL_{place}" for place in range(config.count("num_labels", unnamed))] if unnamed else []
    else:
        try:
            names = [stated[place] for place in sorted(stated, key=int)]
        except (TypeError, ValueError, LookupError) as error:
            raise CheckpointError(f"{config.path}: id2label is not a map from numbers to names: {error}") from error
        if not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{config.path}: id2label is {stated!r}; names were expected")
    return [] if len(names) == 2 and names[0] == "LABEL_0" else names


def set_encoder_keys(
    keys: KeyTable, architecture: str, config: Config, source: Source, file_type: int, blocks: int, classes: list[str]
) -> None:
    """Set the common keys, then that attention goes both ways, the pooling, and the names of the classes."""
    set_common_keys(keys, architecture, config, file_type, blocks)
    keys.boolean(f"{architecture}.attention.causal", False)
    set_pooling(keys, architecture, config, source)
    keys.array(f"{architecture}.classifier.output_labels", ValueType.STRING, classes)


def linear(
    target: str, source: str, shape: tuple[int, int], *, bias: bool = True, optional: bool = False
) -> Iterator[Want]:
    """Want a matrix, and its bias if it has one."""
    yield Want(f"{target}.weight", f"{source}.weight", shape, optional=optional)
    if bias:
        yield Want(f"{target}.bias", f"{source}.bias", shape[:1], optional=optional)


def norm(target: str, source: str, size: int, *, bias: bool = True) -> Iterator[Want]:
    """Want a norm's weight, and its bias if it has one."""
    yield Want(f"{target}.weight", f"{source}.weight", (size,))
    if bias:
        yield Want(f"{target}.bias", f"{source}.bias", (size,))


def map_encoder(
    config: Config,
    stored: Mapping[str, StoredTensor],
    wants: Iterable[Want],
    *,
    blocks: int,
    classes: list[str],
    plain_name: Callable[[str], str],
    unused: Callable[[str], bool],
) -> list[TensorSpec]:
    """Map the tensors of wants that speak of plain names.

    `plain_name` turns a stored name, with whatever prefix the checkpoint gives it, into the one that all checkpoints
    share; what `unused` says yes to then is left out, for it has no part in an embedding.
    """
    if blocks > len(stored):
        raise CheckpointError(f"{config.path}: speaks of {blocks} layers; there are {len(stored)} tensors")
    names = {plain_name(name): name for name in stored}
    if not classes and any(name.startswith("classifier.") for name in names):
        raise CheckpointError(
            f"{config.path}: id2label does not name the classes of the classification head; llama.cpp needs their names"
        )
    found = (_with_stored_names(want, names) for want in wants)
    return map_tensors(config.path.parent, stored, found, ignored=lambda name: unused(plain_name(name)))


def _with_stored_names(want: Want, names: Mapping[str, str]) -> Want:
    parts = tuple(dataclasses.replace(part, source=names.get(part.source, part.source)) for part in want.parts)
    return dataclasses.replace(want, sources=names.get(str(want.sources), want.sources), parts=parts)
