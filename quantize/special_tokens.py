"""Finds the special tokens, the add-BOS/EOS flags and the chat template, as upstream's converter does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from app.errors import TokenizerError
from app.models.gguf_types import ValueType
from quantize.header import KeyTable
from quantize.source import Source

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
}
_FLAG_KEYS = {kind: f"tokenizer.ggml.add_{kind}_token" for kind in ("bos", "eos", "sep")}
_SWITCHES = ("lowercase", "strip_accents")  # of the normalizer


@dataclasses.dataclass
class SpecialTokens:
    """What the tokenizer's files say; `set_keys` writes it in upstream's order."""

    kinds: list[str] = dataclasses.field(default_factory=lambda: list(_KINDS))
    ids: dict[str, int] = dataclasses.field(default_factory=dict)
    flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    chat_template: Any = None
    normalizer: dict[str, bool] = dataclasses.field(default_factory=dict)

    def set_keys(self, keys: KeyTable) -> None:
        """Set ids, flags, chat templates and the normalizer's switches."""
        for kind, token in self.ids.items():
            if kind in _ID_KEYS:
                keys.u32(_ID_KEYS[kind], token)
        for kind, flag in self.flags.items():
            if kind in _FLAG_KEYS:
                keys.boolean(_FLAG_KEYS[kind], flag)
        _set_templates(keys, self.chat_template)
        for name in _SWITCHES:
            if name in self.normalizer:
                keys.boolean(f"tokenizer.ggml.normalizer.{name}", self.normalizer[name])


def find_special_tokens(source: Source, vocabulary: int | None = None) -> SpecialTokens:
    """Read tokenizer.json, tokenizer_config.json and config.json; ids from `vocabulary` on are left out."""
    found = SpecialTokens()
    tokenizer = source.tokenizer or {}
    settings = dict(source.tokenizer_config or {})
    if tokenizer:
        _read_normalizer(found, tokenizer.get("normalizer"))
        _PostProcessor(found, settings).read(tokenizer.get("post_processor"))
    if settings:
        found.chat_template = _chat_template(source, settings)
        added = tokenizer.get("added_tokens") or []
        for kind in found.kinds:
            flag = settings.get(f"add_{kind}_token")
            if isinstance(flag, bool):
                found.flags.setdefault(kind, flag)
            text = _content(settings.get(f"{kind}_token"))
            if text is not None:
                matches = (token.get("id") for token in added if token.get("content") == text)
                _set_id(found, kind, next(matches, None), vocabulary)
    inner = source.config.get("text_config")
    for kind in found.kinds:
        token = source.config.get(f"{kind}_token_id")
        if token is None and isinstance(inner, dict):
            token = inner.get(f"{kind}_token_id")
        _set_id(found, kind, token, vocabulary)
    return found


def _content(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _set_id(found: SpecialTokens, kind: str, token: Any, vocabulary: int | None) -> None:
    if isinstance(token, int) and token >= 0 and (vocabulary is None or token < vocabulary):
        found.ids.setdefault(kind, token)


def _read_normalizer(found: SpecialTokens, normalizer: Any) -> None:
    if not isinstance(normalizer, dict):
        return
    kind = normalizer.get("type")
    if kind == "Lowercase":
        found.normalizer["lowercase"] = True
    elif kind == "StripAccents":
        found.normalizer["strip_accents"] = True
    elif kind == "BertNormalizer":
        found.normalizer |= {name: normalizer[name] for name in _SWITCHES if normalizer.get(name) is not None}
    elif kind == "Sequence":
        for part in normalizer.get("normalizers") or []:
            _read_normalizer(found, part)


class _PostProcessor:
    """Reads from the post-processor which special tokens surround a text.

    `settings` (tokenizer_config.json) is completed on the way: a template's first token is the BOS if none is named,
    and a template's last token is the EOS, even if another is named: that one then becomes end of turn or of message.
    """

    def __init__(self, found: SpecialTokens, settings: dict[str, Any]) -> None:
        self._found = found
        self._settings = settings
        self._known = bool(settings)
        self._bos, self._cls = settings.get("bos_token"), settings.get("cls_token")
        self._eos, self._sep = settings.get("eos_token"), settings.get("sep_token")

    def read(self, processor: Any) -> None:
        if not self._bos and self._cls:
            self._bos = self._name("bos", self._cls)
        if not self._eos and self._sep:
            self._eos = self._name("eos", self._sep)
        if not isinstance(processor, dict):
            return
        for part in processor.get("processors", [processor]):
            if part.get("type") == "ByteLevel":
                self._found.flags.setdefault("bos", False)
                self._found.flags.setdefault("eos", False)
            elif part.get("type") == "TemplateProcessing":
                first, last = self._read_single(part.get("single") or [])
                self._read_pair(part.get("pair") or [], first, last)

    def _name(self, kind: str, token: Any) -> Any:
        if self._known:
            self._settings[f"{kind}_token"] = token
        return token

    def _read_single(self, single: list[Any]) -> tuple[str | None, str | None]:
        if len(single) < 2:
            return None, None
        first, last = _special(single[0]), _special(single[-1])
        if first:
            if not self._known:
                self._bos = first
            elif first not in (self._bos, self._cls):
                self._bos = self._bos or self._name("bos", first)
                self._cls = self._cls or self._name("cls", first)
            self._found.flags["bos"] = first in (self._bos, self._cls)
        if last:
            if self._known and last != self._eos:
                spare = next((kind for kind in ("eot", "eom") if kind not in self._found.kinds), None)
                if spare:
                    self._found.kinds.append(spare)
                    self._name(spare, self._eos)
                self._name("eos", last)
            self._eos = last
            self._found.flags["eos"] = True
        return first, last

    def _read_pair(self, pair: list[Any], first: str | None, last: str | None) -> None:
        if not pair:
            return
        start = 1 if first and _special(pair[0]) == first else 0
        stop = len(pair) - 1 if last and _special(pair[-1]) == last else len(pair)
        inner = pair[start:stop]
        if not inner or [_sequence(inner[0]), _sequence(inner[-1])] != ["A", "B"] or not inner[1:-1]:
            return
        between = inner[1:-1]
        separators = (self._sep, self._eos)
        adds = bool(_special(between[0]) and _special(between[0]) in separators and not last)
        if len(between) == 2:
            adds = adds or bool(_special(between[1]) and _special(between[1]) in separators)
        self._found.flags["sep"] = adds
        if adds and not self._sep:
            self._name("sep", self._eos)


def _special(item: Any) -> str | None:
    return (item.get("SpecialToken") or {}).get("id")


def _sequence(item: Any) -> str | None:
    return (item.get("Sequence") or {}).get("id")


def _chat_template(source: Source, settings: dict[str, Any]) -> Any:
    if "chat_template" in settings:
        template: Any = settings["chat_template"]
    else:
        template = source.read_text("chat_template.jinja")
        if template is None:
            template = (source.read_object("chat_template.json") or {}).get("chat_template")
        else:
            more = sorted((source.folder / "additional_chat_templates").glob("*.jinja"))
            if more:
                named = [{"name": path.stem, "template": source.read_text(str(path))} for path in more]
                template = [{"name": "default", "template": template}, *named]
    return template if isinstance(template, str | list) else None


def _named(templates: list[Any]) -> Iterator[tuple[str, str]]:
    for choice in templates:
        if not isinstance(choice, dict):
            raise TokenizerError(f"chat_template: a list of names and templates was expected, not of {choice!r}")
        name, template = choice.get("name"), choice.get("template")
        if isinstance(name, str) and name and isinstance(template, str):
            yield re.sub("[^A-Za-z0-9]", "_", name), template


def _set_templates(keys: KeyTable, templates: Any) -> None:
    if isinstance(templates, str):
        keys.text("tokenizer.chat_template", templates)
    elif templates:
        named = dict(_named(templates))
        default = named.pop("default", None)
        for name, template in named.items():
            keys.text(f"tokenizer.chat_template.{name}", template)
        keys.array("tokenizer.chat_templates", ValueType.STRING, list(named))
        if default is not None:
            keys.text("tokenizer.chat_template", default)
