"""SentencePiece, from tokenizer.model, or as transformers converts it into tokenizer.json."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from app.errors import TokenizerError
from quantize.source import Source
from quantize.vocab_tokens import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    added_tokens,
    check_ids,
    looks_special,
    named_special_tokens,
)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\u2581"


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Tell whether a tokenizer.json holds a SentencePiece vocabulary, as transformers converts it."""
    model, decoder = tokenizer["model"], tokenizer.get("decoder") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and decoder.get("type") == "Sequence"


def sentencepiece_pieces(source: Source, size: int) -> Vocabulary:
    """Return the pieces of tokenizer.model, and what added_tokens.json adds."""
    words = read_pieces(source.folder / "tokenizer.model", size)
    for text, token in (source.read_object("added_tokens.json") or {}).items():
        words.replace(token, text, USER_DEFINED)
    return words


def read_pieces(path: Path, size: int) -> Vocabulary:
    """Return the first `size` pieces of a SentencePiece model, padded to as many."""
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415 - most models do without it

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{path}: not a SentencePiece model: {error}") from error
    tokens: list[str | bytes] = [f"[PAD{token}]" for token in range(size)]
    words = Vocabulary(tokens, [UNUSED] * size, scores=[-10000.0] * size)
    for token in range(min(pieces.vocab_size(), size)):
        tokens[token] = pieces.IdToPiece(token)
        words.scores[token] = pieces.GetScore(token)
        if pieces.IsUnknown(token):
            words.types[token] = UNKNOWN
        elif pieces.IsControl(token):
            words.types[token] = CONTROL
        elif pieces.IsByte(token):
            words.types[token] = BYTE
        elif not pieces.IsUnused(token):
            words.types[token] = NORMAL
    return words


def sentencepiece(source: Source, size: int) -> Vocabulary:
    """Return the pieces of tokenizer.model, with what tokenizer_config.json and added_tokens.json add."""
    words = sentencepiece_pieces(source, size)
    for number, entry in ((source.tokenizer_config or {}).get("added_tokens_decoder") or {}).items():
        text = entry["content"]
        if entry.get("special") or looks_special(text):
            words.replace(int(number), text, CONTROL)
        else:
            words.replace(int(number), text.replace(_SPACE, " "), USER_DEFINED)
    return words


def converted_sentencepiece(
    source: Source, tokenizer: dict[str, Any], size: int, *, control: Collection[str] = ()
) -> Vocabulary:
    """Return the tokens of a SentencePiece vocabulary in tokenizer.json; `control` names more control tokens."""
    base: dict[str, int] = tokenizer["model"]["vocab"]
    added = added_tokens(source, tokenizer)
    special = {*named_special_tokens(source.tokenizer_config or {}), *control}
    if str((source.tokenizer_config or {}).get("tokenizer_class", "")).startswith("LlamaTokenizer"):
        special |= {"<s>", "</s>", "<unk>"}
    by_id = {token: text for text, token in base.items()} | {entry["id"]: text for text, entry in added.items()}
    check_ids(source, by_id, size)
    words = Vocabulary([], [], scores=[-1000.0] * size)
    for token in range(size):
        text = by_id.get(token)
        if text is None:
            text, kind = f"[PAD{token}]", UNUSED
        elif text in base and _BYTE_TOKEN.fullmatch(text):
            kind = BYTE
        elif text in special:
            kind = CONTROL
        else:
            kind = NORMAL if text in base else USER_DEFINED
        words.tokens.append(text)
        words.types.append(kind)
    return words
