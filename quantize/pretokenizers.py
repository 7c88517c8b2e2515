"""Names the pre-tokenizer: which of llama.cpp's text splitters does what tokenizer.json says. Pure.

The definition is brought into a canonical form and looked up. What is not in the table is refused: a wrong splitter
would make a model that works, and is worse.
"""

from __future__ import annotations

import json
from typing import Any

from app.errors import TokenizerError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BYTES = ("bytes", False)  # the byte alphabet only
_WORDS = ("bytes", True)  # GPT-2's own regular expression, then the byte alphabet
_KNOWN: dict[tuple[Any, ...], str] = {
    ((), (_WORDS,)): "gpt-2",
    ((), (("digits", True), _WORDS)): "smollm",
    ((), (("split", _LLAMA3), _BYTES)): "llama-bpe",
    ((), (("split", _TEKKEN), _BYTES)): "tekken",
    (("NFC",), (("split", _QWEN2), _BYTES)): "qwen2",
}


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name of the splitter that a tokenizer.json defines.

    Raises `TokenizerError` that quotes the definition if none is known to do the same.
    """
    normalizer, splitter = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    form = (tuple(map(_canonical_normalizer, _parts(normalizer, "normalizers"))),
            tuple(map(_canonical_splitter, _parts(splitter, "pretokenizers"))))  # fmt: skip
    name = _KNOWN.get(form)
    if name is None:
        found = json.dumps({"normalizer": normalizer, "pre_tokenizer": splitter}, ensure_ascii=False)
        raise TokenizerError(
            f"tokenizer.json splits text in a way for which no splitter of llama.cpp is known; known: "
            f"{', '.join(_KNOWN.values())}; found: {found[:1000]}"
        )
    return name


def _parts(definition: Any, members: str) -> list[dict[str, Any]]:
    if not isinstance(definition, dict):
        return []
    if definition.get("type") == "Sequence":
        return [part for member in definition.get(members) or [] for part in _parts(member, members)]
    return [definition]


def _canonical_normalizer(part: dict[str, Any]) -> str:
    return str(part["type"]) if set(part) == {"type"} else json.dumps(part, sort_keys=True)


def _canonical_splitter(part: dict[str, Any]) -> tuple[Any, ...]:
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space", True):
        return ("bytes", part.get("use_regex", True))
    if kind == "Digits":
        return ("digits", part.get("individual_digits", False))
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return ("split", (part.get("pattern") or {}).get("Regex"))
    return (json.dumps(part, sort_keys=True),)
