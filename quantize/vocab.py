"""Carries the vocabulary over: byte-level BPE, SentencePiece, and SentencePiece written as tokenizer.json."""

from __future__ import annotations

from quantize.header import KeyTable
from quantize.pretokenizers import pre_tokenizer_name
from quantize.source import Source
from quantize.special_tokens import find_special_tokens
from quantize.vocab_bpe import byte_level_bpe
from quantize.vocab_sentencepiece import converted_sentencepiece, is_sentencepiece, sentencepiece
from quantize.vocab_tokens import damage_named, tokenizer_json

_CODE_LLAMA_TOKENS = 32016
_CODE_LLAMA_END_OF_TURN = 32010
_NO_BOS_TOKENS = 49152  # the vocabularies of Granite and SmolLM, which never want a BOS


def set_bpe_vocabulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys from the byte-level BPE in tokenizer.json, for `size` rows of embeddings."""
    with damage_named(source):
        tokenizer = tokenizer_json(source)
        splitter = pre_tokenizer_name(tokenizer)
        byte_level_bpe(source, tokenizer, size).set_keys(keys, "gpt2", splitter)
        find_special_tokens(source).set_keys(keys)


def set_sentencepiece_vocabulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys from tokenizer.model, for `size` rows of embeddings."""
    with damage_named(source):
        sentencepiece(source, size).set_keys(keys, "llama", "default")
        find_special_tokens(source, size).set_keys(keys)


def set_llama_vocabulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys for a Llama with `size` rows of embeddings, from whichever files there are.

    Like the others, it raises `TokenizerError` that says which file is missing, damaged or beyond what can be carried
    over exactly.
    """
    with damage_named(source):
        settings = source.tokenizer_config or {}
        if settings.get("add_prefix_space") is not None:
            keys.boolean("tokenizer.ggml.add_space_prefix", bool(settings["add_prefix_space"]))
        if (source.folder / "tokenizer.model").is_file():
            set_sentencepiece_vocabulary(keys, source, size)
        elif is_sentencepiece(tokenizer := tokenizer_json(source)):
            converted_sentencepiece(source, tokenizer, size).set_keys(keys, "llama", "default")
            find_special_tokens(source, size).set_keys(keys)
        else:
            set_bpe_vocabulary(keys, source, size)
        if size == _CODE_LLAMA_TOKENS:
            keys.u32("tokenizer.ggml.eot_token_id", _CODE_LLAMA_END_OF_TURN)
        if size == _NO_BOS_TOKENS:
            keys.boolean("tokenizer.ggml.add_bos_token", False)
