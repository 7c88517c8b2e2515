"""What answers look like: whole ones as structs, and the parts that whole answers and streams share."""

from __future__ import annotations

import codecs
import hashlib
import math
import time
import uuid
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.messages import Piece, TokenLogprob
    from app.pool.generation import Generation
    from app.pool.request import ModelInfo

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON doesn't have


class Identity(msgspec.Struct, frozen=True):
    """What every chunk of one answer repeats."""

    id: str
    created: int  # Unix seconds
    model: str
    system_fingerprint: str


def new_identity(prefix: str, model: ModelInfo) -> Identity:
    """Return a fresh identity: `prefix` is "chatcmpl" or "cmpl"."""
    return Identity(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model.id, _fingerprint(model.fingerprint))


def usage(generation: Generation) -> dict[str, Any]:
    """Return the tokens of one answer, summed over its choices."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def plain_message(piece: Piece) -> tuple[dict[str, Any], str | None]:
    """Return the message of a choice that is content and nothing else, and its finish reason."""
    return {"role": "assistant", "content": piece.text, "refusal": None}, piece.finish_reason


def chat_completion(
    identity: Identity,
    pieces: list[Piece],
    generation: Generation,
    read: Callable[[Piece], tuple[dict[str, Any], str | None]] = plain_message,
    extra: dict[str, Any] | None = None,
) -> bytes:
    """Return the body of a whole chat answer; one piece a choice, `read` as a message with a finish reason."""
    choices = [
        {
            "index": index,
            "message": message,
            "logprobs": None if piece.logprobs is None else chat_logprobs(piece.logprobs),
            "finish_reason": reason,
        }
        for index, piece in enumerate(pieces)
        for message, reason in [read(piece)]
    ]
    return _whole("chat.completion", identity, choices, generation, extra)


def text_completion(
    identity: Identity,
    choices: list[tuple[Piece, TextLogprobs]],
    generation: Generation,
    extra: dict[str, Any] | None = None,
) -> bytes:
    """Return the body of a whole text answer: a piece a choice, and what shapes its log probabilities."""
    documents = [
        {
            "text": piece.text,
            "index": index,
            "logprobs": None if piece.logprobs is None else logprobs.take(piece.logprobs),
            "finish_reason": piece.finish_reason,
        }
        for index, (piece, logprobs) in enumerate(choices)
    ]
    return _whole("text_completion", identity, documents, generation, extra)


def model_object(model: ModelInfo) -> dict[str, Any]:
    """Return one item of `/v1/models`; fields beyond OpenAI's four only when they are known."""
    known: dict[str, Any] = {
        "context_length": model.context_length,
        "slots": model.slots,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "description": model.description,
        "type": model.type,
        "bytes": model.bytes,
        "file_bytes": model.file_bytes,
        "trained_context_length": model.trained_context,
        "vocabulary_size": model.vocabulary_size,
        "capabilities": model.capabilities,
        "embedding_size": model.embedding_size,
        "card": model.card,
    }
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        **{name: value for name, value in known.items() if value},
        "ready": model.ready,
    }


def chat_logprobs(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    """Return log probabilities in the shape of chat: a token's text is lossy when its bytes are not whole UTF-8."""
    content = [
        {
            **_chat_token(item.text, item.logprob),
            "top_logprobs": [_chat_token(text, logprob) for _, text, logprob in item.top],
        }
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """Log probabilities in the shape of text completions; keeps count of the characters of one choice."""

    def __init__(self, *, top: bool) -> None:
        self._top = top
        self._characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def begin_at(self, characters: int) -> None:
        """Count from here: below 0 when the first tokens have characters that are not in the text."""
        self._characters = characters

    def take(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        """Return the next tokens; `text_offset` counts characters from the start of the text."""
        offsets = []
        for item in logprobs:
            offsets.append(max(0, self._characters))
            self._characters += len(self._decoder.decode(item.text))
        return {
            "tokens": [_token_text(item.text) for item in logprobs],
            "token_logprobs": [None if math.isnan(item.logprob) else _finite(item.logprob) for item in logprobs],
            "top_logprobs": [self._alternatives(item) for item in logprobs] if self._top else None,
            "text_offset": offsets,
        }

    @staticmethod
    def _alternatives(item: TokenLogprob) -> dict[str, float] | None:
        if math.isnan(item.logprob):
            return None
        ranked = {_token_text(text): _finite(logprob) for _, text, logprob in reversed(item.top)}
        best_first = dict(reversed(ranked.items()))
        best_first.setdefault(_token_text(item.text), _finite(item.logprob))
        return best_first


def _chat_token(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(text)}


def _token_text(text: bytes) -> str:
    r"""Return a token's text; bytes that are not whole UTF-8 as OpenAI writes them: `bytes:\xe2\x80`."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _finite(logprob: float) -> float:
    return max(LEAST_LOGPROB, logprob)


def _whole(
    kind: str,
    identity: Identity,
    choices: list[dict[str, Any]],
    generation: Generation,
    extra: dict[str, Any] | None = None,
) -> bytes:
    return msgspec.json.encode(
        {
            "id": identity.id,
            "object": kind,
            "created": identity.created,
            "model": identity.model,
            "choices": choices,
            "usage": usage(generation),
            "system_fingerprint": identity.system_fingerprint,
            **(extra or {}),
        }
    )


@lru_cache(maxsize=16)
def _fingerprint(of_model: str) -> str:
    """Return what changes when anything does that answers depend on (docs/determinism.md)."""
    return "fp_" + hashlib.sha256(f"{version('pestle')} {of_model}".encode()).hexdigest()[:12]
