"""POST /v1/embeddings and POST /v1/rerank (also /rerank and /v2/rerank, where Jina's and Cohere's clients ask)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler

from app.observability.metrics import Metrics
from app.pool.pool import Pool
from app.pool.request import EmbeddingRequest, ModelInfo
from app.server import answer
from app.server.exchange import exchange_of
from app.server.schema.embeddings import (
    EmbeddingsRequest,
    RerankRequest,
    decode_embeddings,
    decode_rerank,
    embedding_list,
    ranking,
)

Asked = TypeVar("Asked", EmbeddingsRequest, RerankRequest)


def handlers(pool: Pool, metrics: Metrics) -> list[HTTPRouteHandler]:
    """Return the routes."""

    @post("/v1/embeddings", status_code=200)
    async def embeddings(request: Request[Any, Any, Any]) -> Response[Any]:
        body, model, asked = await _read(request, pool, metrics, decode_embeddings)
        vectors, tokens = await _vectors(request, pool, asked)
        document = embedding_list(body, model.id, vectors, tokens)
        return answer.json(document, answer.no_effect_header(body.names_without_effect()))

    @post(["/v1/rerank", "/rerank", "/v2/rerank"], status_code=200)
    async def rerank(request: Request[Any, Any, Any]) -> Response[Any]:
        body, model, asked = await _read(request, pool, metrics, decode_rerank)
        vectors, tokens = await _vectors(request, pool, asked)
        document = ranking(body, model.id, vectors, tokens)
        return answer.json(document, answer.no_effect_header(body.names_without_effect()))

    return [embeddings, rerank]


async def _read(
    request: Request[Any, Any, Any], pool: Pool, metrics: Metrics, decode: Callable[[bytes], Asked]
) -> tuple[Asked, ModelInfo, EmbeddingRequest]:
    exchange = exchange_of(request.scope)
    with answer.refusals_counted(pool, metrics):
        body = await answer.decoded(request, decode)
        asked = body.embedding_request(exchange.request_id, answer.client_of(request))
        model = pool.model(body.model)
        exchange.fields["model"] = model.id
        return body, model, asked


async def _vectors(request: Request[Any, Any, Any], pool: Pool, asked: EmbeddingRequest) -> tuple[bytes, int]:
    (piece,), generation = await answer.whole(request, pool, asked)
    assert piece.vectors is not None  # noqa: S101 - what the worker sends with the end of such a request
    return piece.vectors, generation.prompt_tokens
