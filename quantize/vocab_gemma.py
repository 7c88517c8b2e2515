"""Carries Gemma's tokenizer.json over: SentencePiece's way with spaces and bytes, but merges in place of scores.

llama.cpp knows this kind from Gemma 4. Older Gemmas have a tokenizer.model, with scores, and this only if that is gone.
"""

from __future__ import annotations

from typing import Any

from app.errors import TokenizerError
from quantize.header import KeyTable
from quantize.source import Source
from quantize.special_tokens import find_special_tokens
from quantize.vocab import (
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    converted_sentencepiece,
    damage_named,
    is_sentencepiece,
    looks_special,
    merges_of,
    tokenizer_json,
)

# control tokens that llama.cpp shows all the same, so that what parses chats can see them
_SHOWN = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
_SPACE = "\u2581"
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_ALWAYS_CONTROL = {"<bos>", "<eos>", "<unk>", "<pad>"}  # transformers' defaults for this tokenizer


def set_gemma4_vocabulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys of a Gemma 4 from tokenizer.json, for `size` rows of embeddings.

    Raises `TokenizerError` that says which file is missing, damaged or of another kind.
    """
    with damage_named(source):
        words = _read(source, size, set())
        words.types = [
            USER_DEFINED if text in _SHOWN else kind for text, kind in zip(words.tokens, words.types, strict=True)
        ]
        words.set_keys(keys, "gemma4", "")
        find_special_tokens(source).set_keys(keys)
    keys.boolean("tokenizer.ggml.add_space_prefix", False)
    keys.boolean("tokenizer.ggml.add_bos_token", True)


def set_gemma_vocabulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys of a Gemma 2 or 3 whose tokenizer.model is gone; errors as above."""
    with damage_named(source):
        added = [(entry["content"], entry.get("special")) for entry in tokenizer_json(source).get("added_tokens") or []]
        control = {text for text, special in added if special or looks_special(text)}
        words = _read(source, size, control)
        made = {merge.replace(" ", "", 1) for merge in words.merges}
        unmade = {text for text, _ in added if text not in control and text not in made}
        words.types = [
            USER_DEFINED if kind == NORMAL and text in unmade else kind
            for text, kind in zip(words.tokens, words.types, strict=True)
        ]
        words.set_keys(keys, "gemma4", "")
        find_special_tokens(source, size).set_keys(keys)
    keys.boolean("tokenizer.ggml.add_space_prefix", False)


def _read(source: Source, size: int, control: set[str]) -> Vocabulary:
    path, tokenizer = source.folder / "tokenizer.json", tokenizer_json(source)
    if not is_sentencepiece(tokenizer):
        raise TokenizerError(
            f"{path}: Gemma's tokenizer is a BPE with byte_fallback and a decoder that is a Sequence; this one is not"
        )
    if tokenizer.get("normalizer") != _NORMALIZER:
        raise TokenizerError(f"{path}: Gemma's normalizer turns spaces into {_SPACE!r} and does nothing else")
    control = control | _ALWAYS_CONTROL | _more_special_tokens(source.tokenizer_config or {})
    words = converted_sentencepiece(source, tokenizer, size, control=control)
    words.merges = merges_of(source, tokenizer["model"].get("merges"))
    return words


def _more_special_tokens(settings: dict[str, Any]) -> set[str]:
    """Return the special tokens for images, tools and the like; transformers spells their list in three ways."""
    found: list[Any] = []
    for name in ("extra_special_tokens", "model_specific_special_tokens"):
        entries = settings.get(name) or []
        found += entries.values() if isinstance(entries, dict) else entries
    texts = (entry.get("content") if isinstance(entry, dict) else entry for entry in found)
    return {text for text in texts if isinstance(text, str)}
