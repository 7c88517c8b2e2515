"""Carries a WordPiece vocabulary over: BERT's, whose tokens llama.cpp wants with a phantom space before each word."""

from __future__ import annotations

import json
from typing import Any

from app.errors import TokenizerError
from quantize.header import KeyTable
from quantize.source import Source
from quantize.special_tokens import find_special_tokens
from quantize.vocab_tokens import CONTROL, base_vocabulary, damage_named

_PHANTOM_SPACE = "\u2581"
_CONTINUED = "##"
# llama.cpp splits all WordPiece vocabularies in one way; the names are those that upstream gives the two it knows
_SPLITTER, _CHINESE_SPLITTER = "jina-v2-en", "bert-bge-large"
_CHINESE_TOKENS = 21128


def is_wordpiece(source: Source) -> bool:
    """Tell whether tokenizer.json holds a WordPiece vocabulary."""
    model = (source.tokenizer or {}).get("model")
    return isinstance(model, dict) and model.get("type") == "WordPiece"


def set_wordpiece_vocabulary(keys: KeyTable, source: Source, size: int, token_types: int) -> None:
    """Set the tokenizer's keys from the WordPiece model in tokenizer.json, for `size` rows of embeddings.

    `token_types` is the number of kinds of segments that the model tells apart. Raises `TokenizerError` if the file is
    missing or damaged, or if it prepares text in another way than llama.cpp does.
    """
    with damage_named(source):
        tokenizer = source.tokenizer
        if tokenizer is None:
            raise TokenizerError(
                f"{source.folder}: no tokenizer.json, and vocab.txt alone does not say how text is prepared; "
                f"transformers writes one: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        _check(source, tokenizer)
        words = base_vocabulary(source, tokenizer, size)
        words.tokens = [
            text if kind == CONTROL else _with_phantom_space(str(text))
            for text, kind in zip(words.tokens, words.types, strict=True)
        ]
        keys.u32("tokenizer.ggml.token_type_count", token_types)
        chinese = len(tokenizer["model"]["vocab"]) == _CHINESE_TOKENS
        words.set_keys(keys, "bert", _CHINESE_SPLITTER if chinese else _SPLITTER)
        find_special_tokens(source, size).set_keys(keys)


def _with_phantom_space(token: str) -> str:
    return token[len(_CONTINUED) :] if token.startswith(_CONTINUED) else _PHANTOM_SPACE + token


def _check(source: Source, tokenizer: dict[str, Any]) -> None:
    path = source.folder / "tokenizer.json"
    model, normalizer, splitter = (tokenizer.get(part) or {} for part in ("model", "normalizer", "pre_tokenizer"))
    if model.get("type") != "WordPiece" or model.get("continuing_subword_prefix", _CONTINUED) != _CONTINUED:
        settings = {name: value for name, value in model.items() if name != "vocab"}
        raise TokenizerError(f"{path}: a WordPiece model with the prefix {_CONTINUED} is known; found: {settings}")
    usual = normalizer.get("clean_text", True) and normalizer.get("handle_chinese_chars", True)
    if normalizer.get("type") != "BertNormalizer" or splitter.get("type") != "BertPreTokenizer" or not usual:
        found = json.dumps({"normalizer": normalizer, "pre_tokenizer": splitter}, ensure_ascii=False)
        raise TokenizerError(
            f"{path}: llama.cpp prepares text for WordPiece as a BertNormalizer with clean_text and "
            f"handle_chinese_chars and a BertPreTokenizer do; found: {found[:1000]}"
        )
