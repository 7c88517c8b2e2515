"""The requests of /tokenize, /detokenize and /apply-template, which have llama-server's shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from app.errors import RequestError
from app.pool.request import ChatPrompt
from app.server.schema.chat import decode_chat
from app.server.schema.common import TokenId
from app.server.schema.decode import decode
from app.server.schema.fields import Field

if TYPE_CHECKING:
    from app.messages import Tokenized

MAX_TOKENS = 1_000_000

TOKENIZE: dict[str, Field] = {
    "content": Field("honoured", "a string"),
    "add_special": Field("honoured", "true or false (default): whether to add BOS where the model wants it"),
    "parse_special": Field("honoured", "true (default) or false: whether special tokens that are written out count"),
    "with_pieces": Field("honoured", "true or false (default): objects with id and piece in place of ids"),
    "model": Field("honoured", "the id of a served model; may be left out"),
}
DETOKENIZE: dict[str, Field] = {
    "tokens": Field("honoured", "an array of at most 1000000 token ids"),
    "model": Field("honoured", "the id of a served model; may be left out"),
}


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text to make tokens of."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    model: str | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens to make a text of."""

    tokens: Annotated[list[TokenId], Meta(max_length=MAX_TOKENS)]
    model: str | None = None


_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest, strict=True)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest, strict=True)


def decode_tokenize(body: bytes) -> TokenizeRequest:
    """Return the body of /tokenize. Raises RequestError and UnknownFieldError, each naming the field."""
    return decode(body, _tokenize_decoder, TOKENIZE)


def decode_detokenize(body: bytes) -> DetokenizeRequest:
    """Return the body of /detokenize. Raises RequestError and UnknownFieldError, each naming the field."""
    return decode(body, _detokenize_decoder, DETOKENIZE)


def decode_template(body: bytes, model_id: str) -> tuple[ChatPrompt, str]:
    """Return the messages of a chat request, whose `model` may be missing, and the model that it names.

    Raises what `decode_chat` raises.
    """
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        document = None  # decode_chat says what is wrong
    if isinstance(document, dict) and document.get("model") is None:
        body = msgspec.json.encode(document | {"model": model_id})
    chat = decode_chat(body)
    (prompt,) = chat.generation_request("").prompts
    if not isinstance(prompt, ChatPrompt):
        raise RequestError("'messages' are missing", param="messages")
    return prompt, chat.model


def tokens_document(answer: Tokenized, ids: list[int]) -> dict[str, Any]:
    """Return the answer of /tokenize; a piece that is no whole UTF-8 is an array of bytes."""
    if answer.pieces is None:
        return {"tokens": ids}
    return {"tokens": [{"id": token, "piece": _piece(piece)} for token, piece in zip(ids, answer.pieces, strict=True)]}


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
