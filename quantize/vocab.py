"""Carries the vocabulary over: byte-level BPE, SentencePiece, and SentencePiece written as tokenizer.json."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from app.errors import TokenizerError
from app.models.gguf_types import ValueType
from quantize.header import KeyTable
from quantize.pretokenizers import pre_tokenizer_name
from quantize.source import Source
from quantize.special_tokens import find_special_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CODE_LLAMA_TOKENS = 32016
_CODE_LLAMA_END_OF_TURN = 32010
_NO_BOS_TOKENS = 49152  # the vocabularies of Granite and SmolLM, which never want a BOS
_SPACE = "\u2581"


@dataclasses.dataclass
class Vocabulary:
    """The tokens by id, with llama.cpp's types; scores for SentencePiece, merges for BPE."""

    tokens: list[str | bytes]
    types: list[int]
    scores: list[float] = dataclasses.field(default_factory=list)
    merges: list[str] = dataclasses.field(default_factory=list)

    def replace(self, token: int, text: str, kind: int) -> None:
        """Put an added token in the place of what is there."""
        if 0 <= token < len(self.tokens):  # beyond the embeddings there is nothing that a token could stand for
            self.tokens[token], self.types[token], self.scores[token] = text, kind, -1000.0

    def set_keys(self, keys: KeyTable, model: str, splitter: str) -> None:
        """Set the tokenizer's name and its lists."""
        keys.text("tokenizer.ggml.model", model)
        keys.text("tokenizer.ggml.pre", splitter)
        keys.array("tokenizer.ggml.tokens", ValueType.STRING, self.tokens)
        keys.array("tokenizer.ggml.scores", ValueType.FLOAT32, self.scores)
        keys.array("tokenizer.ggml.token_type", ValueType.INT32, self.types)
        keys.array("tokenizer.ggml.merges", ValueType.STRING, self.merges)


def set_bpe_vocabulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys from the byte-level BPE in tokenizer.json, for `size` rows of embeddings."""
    with damage_named(source):
        tokenizer = tokenizer_json(source)
        splitter = pre_tokenizer_name(tokenizer)
        _byte_level_bpe(source, tokenizer, size).set_keys(keys, "gpt2", splitter)
        find_special_tokens(source).set_keys(keys)


def set_sentencepiece_vocabulary(keys: KeyTable, source: Source, size: int) -> None:
    """Set the tokenizer's keys from tokenizer.model, for `size` rows of embeddings."""
    with damage_named(source):
        _sentencepiece(source, size).set_keys(keys, "llama", "default")
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


@contextlib.contextmanager
def damage_named(source: Source) -> Iterator[None]:
    """Turn what a damaged file makes go wrong into a `TokenizerError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{source.folder}: the tokenizer's files are damaged: {error!r}") from error


def tokenizer_json(source: Source) -> dict[str, Any]:
    """Return the content of tokenizer.json, or raise `TokenizerError` if there is none."""
    if source.tokenizer is None:
        raise TokenizerError(f"{source.folder}: neither tokenizer.model nor tokenizer.json")
    return source.tokenizer


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Tell whether a tokenizer.json holds a SentencePiece vocabulary, as transformers converts it."""
    model, decoder = tokenizer["model"], tokenizer.get("decoder") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and decoder.get("type") == "Sequence"


def looks_special(token: str) -> bool:
    """Tell whether an added token is a control token although its file does not say so."""
    return (
        token in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
        or (token.startswith(("<|", "<\uff5c")) and token.endswith(("|>", "\uff5c>")))
        or (token.startswith("<unused") and token.endswith(">"))
    )


# ---- byte-level BPE


def _byte_level_bpe(source: Source, tokenizer: dict[str, Any], size: int) -> Vocabulary:
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise TokenizerError(f"{source.folder / 'tokenizer.json'}: the model is {model.get('type')!r}; BPE is known")
    words = base_vocabulary(source, tokenizer, size, decoded=_as_decoded)
    words.merges = merges_of(source, model.get("merges"))
    return words


def base_vocabulary(
    source: Source, tokenizer: dict[str, Any], size: int, *, decoded: Callable[[str], str] = str
) -> Vocabulary:
    """Return the tokens of tokenizer.json by id, `size` of them, and their types.

    `decoded` says how the tokenizer's decoder shows an added token.
    """
    model = tokenizer["model"]
    added = added_tokens(source, tokenizer)
    by_id: dict[int, str] = {token: text for text, token in model["vocab"].items()}
    by_id |= {entry["id"]: text for text, entry in added.items()}
    check_ids(source, by_id, size)
    tokens: list[str | bytes] = []
    types: list[int] = []
    for token in range(size):
        text = by_id.get(token)
        if text is None:
            text, kind = f"[PAD{token}]", UNUSED
        elif text in added:
            entry = added[text]
            text = text if entry.get("normalized") else decoded(text)
            if entry.get("special") or looks_special(text):
                kind = CONTROL
            else:
                text, kind = text.replace(_SPACE, " "), USER_DEFINED
        else:
            kind = NORMAL
        tokens.append(text)
        types.append(kind)
    return Vocabulary(tokens, types)


def check_ids(source: Source, by_id: dict[int, str], size: int) -> None:
    """Raise `TokenizerError` for an id that the embeddings have no row for."""
    largest = max(by_id, default=-1)
    if largest >= size:
        raise TokenizerError(
            f"{source.folder}: the tokenizer has the token {by_id[largest]!r} with id {largest}; "
            f"vocab_size in config.json leaves room for {size}"
        )
    if min(by_id, default=0) < 0:
        raise TokenizerError(f"{source.folder}: the tokenizer has a token with a negative id")


def added_tokens(source: Source, tokenizer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return text → entry of the added tokens; where tokenizer_config.json says otherwise, tokenizer.json yields."""
    added: dict[str, dict[str, Any]] = {entry["content"]: entry for entry in tokenizer.get("added_tokens") or []}
    settings, base = source.tokenizer_config or {}, tokenizer["model"]["vocab"]
    named = named_special_tokens(settings)
    decoder = settings.get("added_tokens_decoder") or {}
    more = [decoder[number] for number in sorted(decoder, key=int)]
    more += [{"content": text, "special": True} for text in named if text not in added]
    used = max([-1, *base.values(), *(entry["id"] for entry in added.values())])
    for entry in more:
        text = entry["content"]
        if text not in added and text not in base:
            used += 1
        token = added[text]["id"] if text in added else base.get(text, used)
        added[text] = {**entry, "id": token, "special": entry.get("special") or text in named}
    return added


def named_special_tokens(settings: dict[str, Any]) -> list[str]:
    """Return the texts that tokenizer_config.json gives a role of their own."""
    kinds = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    entries = [settings.get(f"{kind}_token") for kind in kinds] + list(settings.get("additional_special_tokens") or [])
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text))


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


# ---- SentencePiece


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


def _sentencepiece(source: Source, size: int) -> Vocabulary:
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
