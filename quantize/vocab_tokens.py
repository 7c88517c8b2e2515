"""The tokens of a vocabulary as llama.cpp wants them, and what every kind of vocabulary takes from tokenizer.json."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from app.errors import TokenizerError
from app.models.gguf_types import ValueType
from quantize.header import KeyTable
from quantize.source import Source

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
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


def looks_special(token: str) -> bool:
    """Tell whether an added token is a control token although its file does not say so."""
    return (
        token in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
        or (token.startswith(("<|", "<\uff5c")) and token.endswith(("|>", "\uff5c>")))
        or (token.startswith("<unused") and token.endswith(">"))
    )


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
