"""Byte-level BPE, from tokenizer.json: its tokens and its merges."""

from __future__ import annotations

from typing import Any

from app.errors import TokenizerError
from quantize.source import Source
from quantize.vocab_tokens import Vocabulary, base_vocabulary


def byte_level_bpe(source: Source, tokenizer: dict[str, Any], size: int) -> Vocabulary:
    """Return the tokens and merges of a tokenizer.json, for `size` rows of embeddings."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise TokenizerError(f"{source.folder / 'tokenizer.json'}: the model is {model.get('type')!r}; BPE is known")
    words = base_vocabulary(source, tokenizer, size, decoded=_as_decoded)
    words.merges = merges_of(source, model.get("merges"))
    return words


def _byte_alphabet() -> dict[str, int]:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def _as_decoded(text: str) -> str:
    # upstream writes an added token as it comes back from encoding and decoding, which reads letters of GPT-2's
    # byte alphabet as the bytes that they stand for
    if text.isascii() or not all(letter in _BYTE_OF for letter in text):
        return text
    return bytes(_BYTE_OF[letter] for letter in text).decode(errors="replace")


def merges_of(source: Source, merges: Any) -> list[str]:
    """Return a BPE's merges, two parts each, from tokenizer.json's in either form or from merges.txt."""
    if isinstance(merges, list) and merges:
        if all(isinstance(merge, str) for merge in merges):
            return merges
        if all(isinstance(merge, list) and len(merge) == 2 for merge in merges):
            # a space inside a part takes its letter of the byte alphabet, for the space is what parts the two
            return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merges]
        raise TokenizerError(f"{source.folder / 'tokenizer.json'}: the merges are neither strings nor pairs of strings")
    lines = (source.read_text("merges.txt") or "").splitlines()
    parts = [line.split() for line in (lines[1:] if lines and lines[0].startswith("#") else lines)]
    found = [" ".join(part) for part in parts if len(part) == 2]
    if not found:
        raise TokenizerError(f"{source.folder / 'tokenizer.json'}: a BPE tokenizer without merges")
    return found
