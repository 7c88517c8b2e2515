"""Carries Phi's vocabulary over: Phi-3's SentencePiece, whose added tokens three files may name, or Phi-4's BPE."""

from __future__ import annotations

from collections.abc import Iterator

from app.errors import TokenizerError
from quantize.header import KeyTable
from quantize.source import Source
from quantize.special_tokens import find_special_tokens
from quantize.vocab import set_bpe_vocabulary
from quantize.vocab_sentencepiece import is_sentencepiece, sentencepiece_pieces
from quantize.vocab_tokens import CONTROL, USER_DEFINED, damage_named


def set_vocab_phi3ulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys for `size` rows of embeddings.

    Raises `TokenizerError` that says which file is missing, damaged or beyond what can be carried over exactly.
    """
    with damage_named(source):
        if _is_bpe(source):
            set_bpe_vocabulary(keys, source, size)
            return
        words = sentencepiece_pieces(source, size)
        for token, text, special in _added_tokens(source):
            words.replace(token, text, CONTROL if special else USER_DEFINED)
        words.set_keys(keys, "llama", "default")
        find_special_tokens(source, size).set_keys(keys)


def _is_bpe(source: Source) -> bool:
    if (source.tokenizer_config or {}).get("tokenizer_class") == "GPT2Tokenizer":
        return True
    if (source.folder / "tokenizer.model").is_file():
        return False
    if source.tokenizer is None or is_sentencepiece(source.tokenizer):
        raise TokenizerError(f"{source.folder}: no tokenizer.model, which holds the vocabulary of Phi-3")
    return True


def _added_tokens(source: Source) -> Iterator[tuple[int, str, bool]]:
    """Yield id, text and whether it is special; a later mention counts more. Taken literally: no guess, no change."""
    for number, entry in ((source.tokenizer_config or {}).get("added_tokens_decoder") or {}).items():
        yield int(number), entry["content"], bool(entry.get("special"))
    for entry in (source.tokenizer or {}).get("added_tokens") or []:
        yield int(entry["id"]), entry["content"], bool(entry.get("special"))
