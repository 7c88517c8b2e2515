"""Reads config.json's fields: each checked, each error naming the field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from app.errors import CheckpointError
from quantize.header import KeyTable

_MAX_COUNT = (1 << 31) - 1
# llama3's factors are a tensor; dynamic scaling, which llama.cpp does not know, begins beyond the trained context
_WITHOUT_KEYS = {"default", "llama3", "dynamic"}


class Config:
    """The fields of a config.json, defaults filled in; `path` is for messages."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields
        self.rope = self._rope()

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

    def number(self, name: str) -> float:
        """Return a finite number."""
        if name not in self.fields:
            raise CheckpointError(f"{self.path}: {name} is missing")
        return self._finite(name, self.fields[name])

    def rope_number(self, name: str, default: float | None = None) -> float:
        """Return a finite number of the rotary parameters."""
        value = self.rope.get(name, default)
        if value is None:
            raise CheckpointError(f"{self.path}: the rope scaling lacks {name}")
        return self._finite(f"rope {name}", value)

    def _finite(self, name: str, value: Any) -> float:
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
        for name in ("rope_theta", "original_max_position_embeddings"):
            if name not in rope and name in self.fields:
                rope[name] = self.fields[name]
        return rope


def set_rope_scaling(keys: KeyTable, architecture: str, config: Config) -> None:
    """Set the rotary keys: how the context was stretched, and the base frequency."""
    prefix, rope = f"{architecture}.rope", config.rope
    kind = rope.get("rope_type")
    if kind in {"linear", "yarn"} and rope.get("factor") is not None:
        keys.text(f"{prefix}.scaling.type", str(kind))
        keys.f32(f"{prefix}.scaling.factor", config.rope_number("factor"))
        if kind == "yarn":
            trained = config.rope_number("original_max_position_embeddings")
            keys.u32(f"{prefix}.scaling.original_context_length", int(trained))
            for key, names in (
                ("yarn_ext_factor", ("extrapolation_factor",)),
                ("yarn_attn_factor", ("attention_factor", "attn_factor")),
                ("yarn_beta_fast", ("beta_fast",)),
                ("yarn_beta_slow", ("beta_slow",)),
            ):
                name = next((name for name in names if name in rope), None)
                if name is not None and rope[name] is not None:
                    keys.f32(f"{prefix}.scaling.{key}", config.rope_number(name))
    elif kind in {"su", "longrope"}:
        keys.text(f"{prefix}.scaling.type", "longrope")
    elif kind is not None and str(kind).lower() not in _WITHOUT_KEYS:
        raise CheckpointError(f"{config.path}: the rope scaling {kind!r} is not known")
    if "rope_theta" in rope:
        keys.f32(f"{prefix}.freq_base", config.rope_number("rope_theta"))
