"""The `general.*` keys: who made the model, under which name and licence, as upstream's converter finds them out."""

from __future__ import annotations

import re
from typing import Any

from app.errors import CheckpointError
from app.models.gguf_types import ValueType
from quantize.header import KeyTable
from quantize.model_names import NameParts, split_name, title
from quantize.model_size import ModelSize
from quantize.source import Source

_HUB = "huggingface.co"
_HUB_URL = re.compile(rf"https?://{re.escape(_HUB)}/([^/]+/[^/]+)$")

# generation_config.json → key, in upstream's order
_SAMPLING: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("sequence",), "sequence", "text"),
    (("top_k",), "top_k", "i32"),
    (("top_p",), "top_p", "f32"),
    (("min_p",), "min_p", "f32"),
    (("xtc_probability",), "xtc_probability", "f32"),
    (("xtc_threshold",), "xtc_threshold", "f32"),
    (("temperature",), "temp", "f32"),
    (("penalty_last_n",), "penalty_last_n", "i32"),
    (("penalty_repeat", "repetition_penalty"), "penalty_repeat", "f32"),
    (("mirostat",), "mirostat", "i32"),
    (("mirostat_tau",), "mirostat_tau", "f32"),
    (("mirostat_eta",), "mirostat_eta", "f32"),
)
# field → names in the model card's front matter, the first that is there wins
_CARD_TEXTS: dict[str, tuple[str, ...]] = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "description": ("description", "model_description"),
    "size_label": ("size_label", "model_size_label"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
}
_RELATION_FIELDS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


def set_general(keys: KeyTable, source: Source, architecture: str, size: ModelSize) -> None:
    """Set architecture, type, recommended sampling, names, licence, relations, tags and languages."""
    keys.text("general.architecture", architecture)
    keys.text("general.type", "model")
    _set_sampling(keys, source)
    card = _front_matter(source)
    texts = _texts(source, card, size)
    for field in _CARD_TEXTS:
        if texts.get(field) is not None:
            value = texts[field]
            keys.text(f"general.{field}", ",".join(map(str, value)) if isinstance(value, list) else str(value))
    _set_relations(keys, "base_model", card, ("base_model", "base_models", "base_model_sources"), size.weights)
    _set_relations(keys, "dataset", card, ("datasets", "dataset", "dataset_sources"), size.weights)
    for field, names in (("tags", ("tags", "pipeline_tag")), ("languages", ("languages", "language"))):
        listed = [str(item) for name in names for item in _listed(card.get(name))]
        keys.array(f"general.{field}", ValueType.STRING, listed)


def _set_sampling(keys: KeyTable, source: Source) -> None:
    try:
        settings = source.read_object("generation_config.json") or {}
    except CheckpointError:
        return  # a recommendation only: many are damaged
    for names, key, kind in _SAMPLING:
        value = next((settings[name] for name in names if settings.get(name) is not None), None)
        if kind == "text" and isinstance(value, str):
            keys.text(f"general.sampling.{key}", value)
        elif kind != "text" and isinstance(value, int | float):
            if kind == "i32":
                keys.i32(f"general.sampling.{key}", int(value))
            else:
                keys.f32(f"general.sampling.{key}", float(value))


def _front_matter(source: Source) -> dict[str, Any]:
    lines = (source.read_text("README.md") or "").splitlines()
    if not lines or lines[0] != "---":
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    text = "\n".join(lines[1:end]) + "\n"
    text = text.replace("- no\n", '- "no"\n').replace("\t", "  ")  # Norwegian is not `false`; YAML knows no tabs
    import yaml  # noqa: PLC0415 - slow to import, and most folders do without

    try:
        card = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source.folder / 'README.md'}: its front matter is not valid YAML: {error}") from error
    return card if isinstance(card, dict) else {}


def _texts(source: Source, card: dict[str, Any], size: ModelSize) -> dict[str, Any]:
    texts = {
        field: next((card[name] for name in names if card.get(name) is not None), None)
        for field, names in _CARD_TEXTS.items()
    }
    stated = source.config.get("_name_or_path")
    if isinstance(stated, str) and stated and stated.count("/") <= 1:  # more slashes: a path on someone's disk
        _complete(texts, split_name(stated, size.weights))
    _complete(texts, split_name(source.name, size.weights))
    texts["name"] = texts["name"] or source.name
    texts["size_label"] = texts["size_label"] or size.label
    return texts


def _complete(texts: dict[str, Any], parts: NameParts) -> None:
    found = {
        "name": title(parts.full_name) if parts.full_name is not None else None,
        "organization": title(parts.organization) if parts.organization is not None else None,
        "basename": parts.basename,
        "finetune": parts.finetune,
        "version": parts.version,
        "size_label": parts.size_label,
    }
    for field, value in found.items():
        if texts[field] is None:
            texts[field] = value


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list) else []


def _set_relations(keys: KeyTable, kind: str, card: dict[str, Any], names: tuple[str, ...], weights: int) -> None:
    name = next((name for name in names if name in card), None)
    if name is None:
        return
    entries = [_relation(entry, weights) for entry in _listed(card[name])]
    keys.u32(f"general.{kind}.count", len(entries))
    for place, entry in enumerate(entries):
        for field in _RELATION_FIELDS:
            if field in entry:
                keys.text(f"general.{kind}.{place}.{field}", str(entry[field]))


def _relation(entry: Any, weights: int) -> dict[str, Any]:
    if isinstance(entry, dict):
        return entry
    if not isinstance(entry, str):
        return {}
    relation: dict[str, Any] = {}
    hub_name: str | None = entry
    if entry.startswith(("http://", "https://", "ssh://")):
        relation["repo_url"] = entry
        match = _HUB_URL.match(entry)
        hub_name = match[1] if match else None
    if hub_name is None:
        return relation
    parts = split_name(hub_name, weights)
    if parts.full_name is not None:
        relation["name"] = title(parts.full_name)
    if parts.organization is not None:
        relation["organization"] = title(parts.organization)
    if parts.version is not None:
        relation["version"] = parts.version
    if hub_name is entry and parts.organization is not None and parts.full_name is not None:
        relation["repo_url"] = f"https://{_HUB}/{parts.organization}/{parts.full_name}"
    return relation
