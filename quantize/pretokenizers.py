"""Names the pre-tokenizer: which of llama.cpp's text splitters does what tokenizer.json says. Pure.

The definition is brought into a canonical form and looked up. What is not in the table is refused: a wrong splitter
would make a model that works, and is worse. llama.cpp knows several names for some splitters, after the vocabularies
that they first came with; then the vocabulary's own tokens decide, so that the name is the one that upstream gives.
The proof (see `proof`) has the last word on every choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from app.errors import TokenizerError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA_CPP_UPPER, _LLAMA_CPP_LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"


def _by_case(upper: str, lower: str, suffix: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"
    return f"{words}|{digits}|{_REST_WITH_SLASH}"


_TEKKEN = _by_case(_UPPER, _LOWER, "", r"\p{N}")
_O200K = _by_case(_UPPER, _LOWER, _CONTRACTIONS + "?", r"\p{N}{1,3}")
# llama.cpp tells capitals from small letters within ASCII only, and takes no marks for letters
_AS_LLAMA_CPP_SPLITS = {
    _TEKKEN: _by_case(_LLAMA_CPP_UPPER, _LLAMA_CPP_LOWER, "", r"\p{N}"),
    _O200K: _by_case(_LLAMA_CPP_UPPER, _LLAMA_CPP_LOWER, _CONTRACTIONS + "?", r"\p{N}{1,3}"),
}

_BYTES = ("bytes", False)  # the byte alphabet only
_WORDS = ("bytes", True)  # GPT-2's own regular expression, then the byte alphabet
_DIGITS = ("digits", True)  # each by itself

_Chooser = Callable[[dict[str, Any]], str]


def _with_digits(tokenizer: dict[str, Any]) -> str:
    if not _has(tokenizer, "<fim_prefix>"):
        return "smollm"
    return "starcoder" if _has(tokenizer, "<repo_name>") else "refact"  # Granite's is the vocabulary of Refact


def _with_cl100k(tokenizer: dict[str, Any]) -> str:
    if _has(tokenizer, "<|startoftext|>") and _has(tokenizer, "<|im_end|>"):
        return "lfm2"
    if _has(tokenizer, "<|begin_of_text|>") and not _adds_bos(tokenizer):
        return "smaug-bpe"  # Llama 3's vocabulary without a BOS, as SmolLM3 has it
    model = tokenizer.get("model")
    if _adds_bos(tokenizer) or model is None or model.get("ignore_merges"):
        return "llama-bpe"  # takes whole words that are in the vocabulary without merging
    return "dbrx"  # Phi-4, OLMo 2 and 3, Granite 4: GPT-4's own vocabulary


def _with_qwen2(tokenizer: dict[str, Any]) -> str:
    return "deepseek-r1-qwen" if _has(tokenizer, "<\uff5cbegin\u2581of\u2581sentence\uff5c>") else "qwen2"


def _with_o200k(tokenizer: dict[str, Any]) -> str:
    return "llama4" if _has(tokenizer, "<|begin_of_text|>") else "gpt-4o"


def _with_nfc(tokenizer: dict[str, Any]) -> str:
    return "modern-bert" if _has(tokenizer, "[MASK]") else "olmo"


_KNOWN: dict[tuple[Any, ...], str | _Chooser] = {
    ((), (_WORDS,)): "gpt-2",
    (("NFC",), (_WORDS,)): _with_nfc,
    ((), (_DIGITS, _WORDS)): _with_digits,
    (("NFC",), (_DIGITS, _WORDS)): "command-r",
    ((), (("split", _CL100K), _BYTES)): _with_cl100k,
    ((), (("split", _QWEN2), _BYTES)): "stablelm2",
    (("NFC",), (("split", _QWEN2), _BYTES)): _with_qwen2,
    (("NFC",), (("split", _QWEN35), _BYTES)): "qwen35",
    ((), (("split", _TEKKEN), _BYTES)): "tekken",
    ((), (("split", _O200K), _BYTES)): _with_o200k,
}
_NAMES = (
    "gpt-2, modern-bert, olmo, smollm, starcoder, refact, command-r, llama-bpe, smaug-bpe, dbrx, lfm2, stablelm2, "
    "qwen2, deepseek-r1-qwen, qwen35, tekken, gpt-4o, llama4"
)


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name of the splitter that a tokenizer.json defines.

    Raises `TokenizerError` that quotes the definition if none is known to do the same.
    """
    normalizer, splitter = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    form = (tuple(map(_canonical_normalizer, _parts(normalizer, "normalizers"))),
            tuple(map(_canonical_splitter, _parts(splitter, "pretokenizers"))))  # fmt: skip
    known = _KNOWN.get(form)
    if known is None:
        found = json.dumps({"normalizer": normalizer, "pre_tokenizer": splitter}, ensure_ascii=False)
        raise TokenizerError(
            f"tokenizer.json splits text in a way for which no splitter of llama.cpp is known; known: {_NAMES}; "
            f"found: {found[:1000]}"
        )
    return known if isinstance(known, str) else known(tokenizer)


def as_llama_cpp_splits(tokenizer: dict[str, Any]) -> dict[str, Any] | None:
    """Return a tokenizer.json that splits as llama.cpp does, where that is known to differ a little; else None."""
    parts = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    changed = [dict(part) for part in parts]
    for part in changed:
        form = _canonical_splitter(part)
        if form[0] == "split" and form[1] in _AS_LLAMA_CPP_SPLITS:
            part["pattern"] = {"Regex": _AS_LLAMA_CPP_SPLITS[form[1]]}
    if changed == parts:
        return None
    return {**tokenizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": changed}}


def _has(tokenizer: dict[str, Any], token: str) -> bool:
    return any(entry.get("content") == token for entry in tokenizer.get("added_tokens") or [])


def _adds_bos(tokenizer: dict[str, Any]) -> bool:
    processor = tokenizer.get("post_processor") or {}
    for part in processor.get("processors") or [processor]:
        single = part.get("single") or [{}] if part.get("type") == "TemplateProcessing" else [{}]
        if "SpecialToken" in single[0]:
            return True
    return False


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
    # these expressions match all of a text: to keep what they match and to throw away what they don't are the same
    if kind == "Split" and (part.get("behavior"), bool(part.get("invert"))) in {("Isolated", False), ("Removed", True)}:
        regex = (part.get("pattern") or {}).get("Regex")
        if isinstance(regex, str):
            return ("split", regex.replace("\r", "\\r").replace("\n", "\\n"))  # some files hold the characters
    return (json.dumps(part, sort_keys=True),)
