"""Carries Gemma's tokenizer.json over: SentencePiece's way with spaces and bytes, but merges in place of scores.

llama.cpp knows this kind from Gemma 4. Older Gemmas have a tokenizer.model, with scores, and this only if that is gone.
"""

from __future__ import annotations

from typing import Any

from app.errors import TokenizerError
from quantize.header import KeyTable
from quantize.source import Source
from quantize.special_tokens import find_special_tokens
from quantize.vocab_bpe import merges_of
from quantize.vocab_sentencepiece import converted_sentencepiece, is_sentencepiece
from quantize.vocab_tokens import CONTROL, NORMAL, USER_DEFINED, Vocabulary, damage_named, looks_special, tokenizer_json

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
        words = _read(source, size)
        words.types = [
            USER_DEFINED if text in _SHOWN else kind for text, kind in zip(words.tokens, words.types, strict=True)
        ]
        if changed := _mark_added_tokens(words, source, unused=False):
            source.notes.append(
                f"added tokens that tokenizer_config.json does not name: {changed}; they are marked so that llama.cpp "
                f"finds them in a text, which upstream's converter does not do"
            )
        words.set_keys(keys, "gemma4", "")
        find_special_tokens(source).set_keys(keys)
    keys.boolean("tokenizer.ggml.add_space_prefix", False)
    keys.boolean("tokenizer.ggml.add_bos_token", True)


def set_gemma_vocabulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys of a Gemma 2 or 3 whose tokenizer.model is gone; errors as above."""
    with damage_named(source):
        if tokenizer_json(source).get("normalizer") != _NORMALIZER:
            raise TokenizerError(
                f"{source.folder / 'tokenizer.json'}: Gemma's normalizer turns spaces into {_SPACE!r} and does nothing "
                f"else; tokenizer.model is needed"
            )
        words = _read(source, size)
        _mark_added_tokens(words, source, unused=True)
        words.set_keys(keys, "gemma4", "")
        find_special_tokens(source, size).set_keys(keys)
    keys.boolean("tokenizer.ggml.add_space_prefix", False)


def _read(source: Source, size: int) -> Vocabulary:
    tokenizer = tokenizer_json(source)
    if not is_sentencepiece(tokenizer):
        raise TokenizerError(
            f"{source.folder / 'tokenizer.json'}: Gemma's tokenizer is a BPE with byte_fallback and a decoder that is "
            f"a Sequence; this one is not"
        )
    control = _ALWAYS_CONTROL | _more_special_tokens(source.tokenizer_config or {})
    words = converted_sentencepiece(source, tokenizer, size, control=control)
    words.merges = merges_of(source, tokenizer["model"].get("merges"))
    return words


def _mark_added_tokens(words: Vocabulary, source: Source, *, unused: bool) -> int:
    """Give added tokens that no merge makes a type by which llama.cpp finds them in a text; return how many.

    `unused` says whether that goes for the many placeholders as well.
    """
    made = {merge.replace(" ", "", 1) for merge in words.merges}
    kinds: dict[str | bytes, int] = {}
    for entry in tokenizer_json(source).get("added_tokens") or []:
        text = entry["content"]
        if entry.get("special") or (unused and looks_special(text)):
            kinds[text] = CONTROL
        elif text not in made and not looks_special(text):
            kinds[text] = USER_DEFINED
    places = [
        token
        for token, (text, kind) in enumerate(zip(words.tokens, words.types, strict=True))
        if kind == NORMAL and text in kinds
    ]
    for token in places:
        words.types[token] = kinds[words.tokens[token]]
    return len(places)


def _more_special_tokens(settings: dict[str, Any]) -> set[str]:
    """Return the special tokens for images, tools and the like; transformers spells their list in three ways."""
    found: list[Any] = []
    for name in ("extra_special_tokens", "model_specific_special_tokens"):
        entries = settings.get(name) or []
        found += entries.values() if isinstance(entries, dict) else entries
    texts = (entry.get("content") if isinstance(entry, dict) else entry for entry in found)
    return {text for text in texts if isinstance(text, str)}
