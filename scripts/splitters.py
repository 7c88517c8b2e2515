"""How the original checkpoints' tokenizer.json split text, by the name that llama.cpp gives the splitter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_REGEX = _CONTRACTIONS + (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_REGEX = _CONTRACTIONS + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN35_REGEX = _CONTRACTIONS + (
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitter:
    """The parts of tokenizer.json that come before the merges.

    `whole_words` is the model's `ignore_merges`; `specials_outside` says that special tokens are added tokens only, and
    not in the model's vocabulary too.
    """

    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    whole_words: bool = False
    specials_outside: bool = False


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _by_regex(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return _sequence(split, _byte_level(use_regex=False))


_NFC = {"type": "NFC"}
_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))

SPLITTERS: dict[str, Splitter] = {
    "llama-bpe": Splitter(_by_regex(LLAMA3_REGEX), whole_words=True, specials_outside=True),
    "smollm": Splitter(_DIGITS),
    "starcoder": Splitter(_DIGITS),
    "refact": Splitter(_DIGITS),
    "command-r": Splitter(_DIGITS, normalizer=_NFC),
    "gpt-2": Splitter(_byte_level(use_regex=True)),
    "modern-bert": Splitter(_byte_level(use_regex=True), normalizer=_NFC),
    "qwen2": Splitter(_by_regex(QWEN2_REGEX), normalizer=_NFC, specials_outside=True),
    "qwen35": Splitter(_by_regex(QWEN35_REGEX), normalizer=_NFC, specials_outside=True),
}
