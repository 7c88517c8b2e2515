"""Reads config.json's fields: each checked, each error naming the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from app.errors import CheckpointError
from quantize.source import Source

_MAX_COUNT = (1 << 31) - 1
_LOCAL_THETA = ("local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta", "rope_local_base_freq")
_MIRRORED = (  # rotary parameters that config.json may have outside of its rope object, with their spellings
    ("rope_theta", ("global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta", "rotary_emb_base")),
    ("partial_rotary_factor", ("partial_rotary_factor", "rope_pct", "rope_percent")),
    ("original_max_position_embeddings", ("original_max_position_embeddings",)),
)


class Config:
    """The fields of a config.json, a text model's own brought to the top, null ones replaced by the defaults.

    `path` is for messages. `rope` holds the rotary parameters of full attention, whichever way config.json spells them;
    `rope_all` also has those of other kinds of layers, if there are any.
    """

    def __init__(self, source: Source, defaults: Mapping[str, Mapping[str, Any]]) -> None:
        """Read a source's config.json; `defaults` are those of transformers' config classes, by `model_type`."""
        self.path = source.folder / "config.json"
        stated = source.config
        if isinstance(stated.get("text_config"), dict):
            stated = {**stated, **stated["text_config"]}
        known = defaults.get(str(stated.get("model_type")), {})
        self.fields: dict[str, Any] = {**known, **{key: value for key, value in stated.items() if value is not None}}
        self.rope_all = self._rope()
        self.rope: dict[str, Any] = self.rope_all.get("full_attention", self.rope_all)

    def optional_count(self, name: str) -> int | None:
        """Return a positive integer, or None if the field is absent."""
        value = self.fields.get(name)
        if value is None:
            return None
        if type(value) is not int or not 0 < value <= _MAX_COUNT:
            raise CheckpointError(f"{self.path}: {name} is {value!r}; a positive integer was expected")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.optional_count(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: {name} is missing")
        return value

    def first(self, *names: str) -> str | None:
        """Return the first of these fields that is there and not null."""
        return next((name for name in names if self.fields.get(name) is not None), None)

    def sizes(self, name: str) -> int | list[int]:
        """Return an integer from 0 on, or one for each layer."""
        value = self.fields.get(name)
        for item in value if isinstance(value, list) and value else [value]:
            if type(item) is not int or not 0 <= item <= _MAX_COUNT:
                raise CheckpointError(f"{self.path}: {name} is {value!r}; an integer from 0 on was expected")
        return value  # type: ignore[return-value]  # checked above

    def number(self, name: str) -> float:
        """Return a finite number."""
        if name not in self.fields:
            raise CheckpointError(f"{self.path}: {name} is missing")
        return self.finite(name, self.fields[name])

    def rope_number(self, name: str, default: float | None = None) -> float:
        """Return a finite number of the rotary parameters."""
        value = self.rope.get(name, default)
        if value is None:
            raise CheckpointError(f"{self.path}: the rope scaling lacks {name}")
        return self.finite(f"rope {name}", value)

    def finite(self, name: str, value: Any) -> float:
        """Return the value as a number, if it is a finite one."""
        if type(value) not in {int, float} or not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {name} is {value!r}; a finite number was expected")
        return float(value)

    def _rope(self) -> dict[str, Any]:
        stated = self.fields.get("rope_parameters", self.fields.get("rope_scaling")) or {}
        if not isinstance(stated, dict):
            raise CheckpointError(f"{self.path}: the rope scaling is {stated!r}; an object was expected")
        rope = dict(stated)
        if "type" in rope:
            rope["rope_type"] = rope["type"]  # the older spelling
        if not isinstance(rope.get("rope_type", ""), str | None):
            raise CheckpointError(f"{self.path}: the rope scaling {rope['rope_type']!r} is not known")
        nested = [name for name in ("full_attention", "sliding_attention") if name in rope]
        for name in nested:
            if not isinstance(rope[name] or {}, dict):
                raise CheckpointError(f"{self.path}: the rope of {name} is {rope[name]!r}; an object was expected")
            rope[name] = rope[name] or {}
        if nested:
            return rope
        if local := self.first(*_LOCAL_THETA):
            rope["sliding_attention"] = {"rope_theta": self.fields[local]}
        for name, names in _MIRRORED:
            if name not in rope and (found := self.first(*names)):
                rope[name] = self.fields[found]
        return rope
