"""Carries Gemma 4's vocabulary over: SentencePiece's way with spaces and bytes, but merges in place of scores."""

from __future__ import annotations

from typing import Any

from app.errors import TokenizerError
from quantize.header import KeyTable
from quantize.source import Source
from quantize.special_tokens import find_special_tokens
from quantize.vocab import (
    USER_DEFINED,
    converted_sentencepiece,
    damage_named,
    is_sentencepiece,
    merges_of,
    tokenizer_json,
)

# control tokens that llama.cpp shows all the same, so that what parses chats can see them
_SHOWN = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
_ALWAYS_CONTROL = {"<bos>", "<eos>", "<unk>", "<pad>"}  # transformers' defaults for this tokenizer


def set_gemma4_vocabulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys from tokenizer.json, for `size` rows of embeddings.

    Raises `TokenizerError` that says which file is missing, damaged or of another kind.
    """
    with damage_named(source):
        tokenizer = tokenizer_json(source)
        if not is_sentencepiece(tokenizer):
            raise TokenizerError(
                f"{source.folder / 'tokenizer.json'}: Gemma 4's tokenizer is a BPE with byte_fallback and a decoder "
                f"that is a Sequence; this one is not"
            )
        control = _ALWAYS_CONTROL | _more_special_tokens(source.tokenizer_config or {})
        words = converted_sentencepiece(source, tokenizer, size, control=control)
        words.types = [
            USER_DEFINED if text in _SHOWN else kind for text, kind in zip(words.tokens, words.types, strict=True)
        ]
        words.merges = merges_of(source, tokenizer["model"].get("merges"))
        words.set_keys(keys, "gemma4", "")
        find_special_tokens(source).set_keys(keys)
    keys.boolean("tokenizer.ggml.add_space_prefix", False)
    keys.boolean("tokenizer.ggml.add_bos_token", True)


def _more_special_tokens(settings: dict[str, Any]) -> set[str]:
    """Return the special tokens for images, tools and the like; transformers spells their list in three ways."""
    found: list[Any] = []
    for name in ("extra_special_tokens", "model_specific_special_tokens"):
        entries = settings.get(name) or []
        found += entries.values() if isinstance(entries, dict) else entries
    texts = (entry.get("content") if isinstance(entry, dict) else entry for entry in found)
    return {text for text in texts if isinstance(text, str)}
