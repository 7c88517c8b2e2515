"""Carries a unigram vocabulary over: that of XLM-RoBERTa, which many multilingual embedding models share."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from app.errors import TokenizerError
from app.models.gguf_types import ValueType
from quantize.header import KeyTable
from quantize.source import Source
from quantize.special_tokens import find_special_tokens
from quantize.vocab_sentencepiece import read_pieces
from quantize.vocab_tokens import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    added_tokens,
    check_ids,
    damage_named,
    named_special_tokens,
)

_PIECES_FILE = "sentencepiece.bpe.model"
_FIRST = ["<s>", "<pad>", "</s>", "<unk>"]  # XLM-RoBERTa's own, in place of the three that SentencePiece begins with
_UNIGRAM = 1


def is_unigram(source: Source) -> bool:
    """Tell whether tokenizer.json holds a unigram vocabulary."""
    model = (source.tokenizer or {}).get("model")
    return isinstance(model, dict) and model.get("type") == "Unigram"


def set_unigram_vocabulary(
    keys: KeyTable, source: Source, size: int, token_types: int, *, mask: int | None = None
) -> None:
    """Set the tokenizer's keys from sentencepiece.bpe.model, else from tokenizer.json, for `size` rows of embeddings.

    `token_types` is the number of kinds of segments that the model tells apart; `mask` is the id of a mask token that
    sentencepiece.bpe.model lacks. Raises `TokenizerError` if a file is missing, damaged, or of another kind.
    """
    with damage_named(source):
        tokenizer = source.tokenizer
        if tokenizer is None:
            raise TokenizerError(f"{source.folder}: no tokenizer.json; it says which tokens surround a text")
        if (source.folder / _PIECES_FILE).is_file():
            words, prefix, merge_spaces, characters = _from_pieces(source, size, mask)
        else:
            words, prefix, merge_spaces, characters = _from_json(source, tokenizer, size)
        if characters and int.from_bytes(characters[:4], "little") > len(characters) - 4:
            raise ValueError("the normalizer's map of characters is cut off")
        words.set_keys(keys, "t5", "default")
        keys.boolean("tokenizer.ggml.add_space_prefix", prefix)
        keys.u32("tokenizer.ggml.token_type_count", token_types)
        keys.boolean("tokenizer.ggml.remove_extra_whitespaces", merge_spaces)
        keys.array("tokenizer.ggml.precompiled_charsmap", ValueType.UINT8, characters)
        find_special_tokens(source, size).set_keys(keys)


def _from_pieces(source: Source, size: int, mask: int | None) -> tuple[Vocabulary, bool, bool, bytes]:
    path = source.folder / _PIECES_FILE
    words = read_pieces(path, size)
    content = source.read_bytes(_PIECES_FILE) or b""
    count, trainer, normalizer = 0, b"", b""
    for field, value in _fields(content):
        if field == 1:
            count += 1
        elif field == 2 and isinstance(value, bytes):
            trainer = value
        elif field == 3 and isinstance(value, bytes):
            normalizer = value
    if dict(_fields(trainer)).get(3, _UNIGRAM) != _UNIGRAM:
        raise TokenizerError(f"{path}: not a unigram model")
    if count > size:
        raise TokenizerError(f"{path}: {count} pieces; vocab_size in config.json leaves room for {size}")
    words.tokens = [*_FIRST, *words.tokens[3:-1]]
    words.scores = [0.0] * 4 + words.scores[3:-1]
    words.types = [CONTROL, CONTROL, CONTROL, UNKNOWN, *words.types[3:-1]]
    if mask is not None and mask < size:
        words.tokens[mask], words.scores[mask], words.types[mask] = "<mask>", 0.0, CONTROL
    settings = dict(_fields(normalizer))
    characters = settings.get(2, b"")
    if not isinstance(characters, bytes):
        raise TypeError(f"the map of characters in {_PIECES_FILE}")
    return words, bool(settings.get(3, 1)), bool(settings.get(4, 1)), characters


def _from_json(source: Source, tokenizer: dict[str, Any], size: int) -> tuple[Vocabulary, bool, bool, bytes]:
    path, model, normalizer = source.folder / "tokenizer.json", tokenizer["model"], tokenizer["normalizer"] or {}
    if model.get("type") != "Unigram" or normalizer.get("type") != "Precompiled":
        raise TokenizerError(
            f"{path}: a Unigram model with a Precompiled normalizer is known; found a {model.get('type')} model with "
            f"{normalizer.get('type')}; {_PIECES_FILE} would say it all"
        )
    settings = source.tokenizer_config or {}
    pieces: dict[str, int] = {piece: token for token, (piece, _) in enumerate(model["vocab"])}
    if not all(isinstance(piece, str) for piece in pieces):
        raise ValueError("a piece that is not text")
    entries = added_tokens(source, {**tokenizer, "model": {"vocab": pieces}})
    added = {text: entry["id"] for text, entry in entries.items()}
    by_id = {token: text for text, token in (pieces | added).items()}
    check_ids(source, by_id, size)
    unknown = added.get(str(settings.get("unk_token")), model.get("unk_id", 3))
    special = {added.get(text) for text in [*named_special_tokens(settings), *_FIRST, "<mask>"]}
    words = Vocabulary([f"[PAD{token}]" for token in range(size)], [UNUSED] * size, scores=[-10000.0] * size)
    for token, (piece, score) in enumerate(model["vocab"]):
        words.tokens[token], words.scores[token] = piece, float(score)
        if token == unknown:
            words.types[token] = UNKNOWN
        elif token in special:
            words.types[token] = CONTROL
        else:
            words.types[token] = USER_DEFINED if piece in added else NORMAL
    return (
        words,
        bool(settings.get("add_prefix_space", False)),
        bool(settings.get("clean_up_tokenization_spaces", False)),
        base64.b64decode(normalizer["precompiled_charsmap"]),
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a protocol buffer."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        if kind not in {1, 2, 5}:
            raise ValueError(f"wire type {kind} in {_PIECES_FILE}")
        length, place = _varint(message, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
        if place + length > len(message):
            raise ValueError(f"{_PIECES_FILE} is cut off")
        yield tag >> 3, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(message) or shift > 63:
            raise ValueError(f"{_PIECES_FILE} is cut off")
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
