"""POST /tokenize, /detokenize and /apply-template: what the vocabulary and the template alone can answer."""

import sys
from array import array
from typing import Any

from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler

from app.pool.pool import Pool
from app.server.answer import decoded
from app.server.disconnect import unless_gone
from app.server.schema.text import decode_detokenize, decode_template, decode_tokenize, tokens_document


def handlers(pool: Pool) -> list[HTTPRouteHandler]:
    """Return the routes."""

    @post("/tokenize", status_code=200)
    async def tokenize(request: Request[Any, Any, Any]) -> Response[Any]:
        asked = await decoded(request, decode_tokenize)
        _check(pool, asked.model)
        work = pool.text.tokenize(
            asked.content,
            add_special=asked.add_special,
            parse_special=asked.parse_special,
            with_pieces=asked.with_pieces,
        )
        answer = await unless_gone(request.receive, work)
        return Response(tokens_document(answer, _ids(answer.tokens)))

    @post("/detokenize", status_code=200)
    async def detokenize(request: Request[Any, Any, Any]) -> Response[Any]:
        asked = await decoded(request, decode_detokenize)
        _check(pool, asked.model)
        text = await unless_gone(request.receive, pool.text.detokenize(asked.tokens, "tokens"))
        return Response({"content": text})

    @post("/apply-template", status_code=200)
    async def apply_template(request: Request[Any, Any, Any]) -> Response[Any]:
        served = pool.models()[0].id
        prompt, model = await decoded(request, lambda body: decode_template(body, served))
        _check(pool, model)
        return Response({"prompt": await unless_gone(request.receive, pool.text.written_chat(prompt))})

    return [tokenize, detokenize, apply_template]


def _check(pool: Pool, model: str | None) -> None:
    if model is not None:
        pool.model(model)


def _ids(tokens: bytes) -> list[int]:
    ids = array("i", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()
