"""From a checked request to its answer, whole or streamed: what chat and text completions share."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from litestar.response import Response

from app.errors import PestleError
from app.observability import logging
from app.pool.generation import Generation
from app.server import sse
from app.server.disconnect import unless_gone
from app.server.exceptions import error_document, unexpected
from app.server.exchange import exchange_of
from app.server.limits import read_json_body
from app.server.patience import client_patience
from app.server.schema.chat import ChatRequest
from app.server.schema.completions import CompletionRequest
from app.server.schema.responses import usage
from app.server.unknown_fields import decode_without_unknown

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from litestar.connection import Request

    from app.messages import Piece
    from app.observability.metrics import Metrics
    from app.pool.pool import Pool
    from app.pool.request import EmbeddingRequest, GenerationRequest, ModelInfo
    from app.server.exchange import Exchange


Asked = TypeVar("Asked", ChatRequest, CompletionRequest)
Document = TypeVar("Document")


async def read(
    request: Request[Any, Any, Any], pool: Pool, metrics: Metrics, decode: Callable[[bytes], Asked]
) -> tuple[Asked, ModelInfo, GenerationRequest]:
    """Return the decoded body, the model that it names, and what to ask the pool for.

    Raises what reading and decoding raise, and ModelNotFoundError; such refusals are counted under the served model.
    """
    exchange = exchange_of(request.scope)
    with refusals_counted(pool, metrics):
        patience = client_patience(request.headers)
        asked = await decoded(request, decode)
        wanted = asked.generation_request(exchange.request_id, client_of(request))
        model = pool.model(asked.model)
        exchange.fields["model"] = model.id
        return asked, model, msgspec.structs.replace(wanted, patience=patience, streams=asked.stream is True)


@contextlib.contextmanager
def refusals_counted(pool: Pool, metrics: Metrics) -> Iterator[None]:
    """Count what is refused in the block under the served model."""
    try:
        yield
    except PestleError as error:
        metrics.model(pool.models()[0].id).failure(error.code or error.type)
        raise


async def decoded(request: Request[Any, Any, Any], decode: Callable[[bytes], Document]) -> Document:
    """Return the body, decoded. Raises what reading and decoding raise."""
    body = await read_json_body(request)
    return decode_without_unknown(body, decode, exchange_of(request.scope))


def client_of(request: Request[Any, Any, Any]) -> str:
    """Return who is to get a fair share: the connection."""
    return "{}:{}".format(*request.scope["client"]) if request.scope["client"] else ""


def no_effect_header(names: list[str]) -> dict[str, str]:
    """Return the header that names what was accepted and cannot change the answer."""
    return {"x-pestle-no-effect": ", ".join(names)} if names else {}


def json(body: bytes, headers: dict[str, str]) -> Response[bytes]:
    """Return an encoded document as the answer."""
    return Response(body, media_type="application/json", headers=headers)


async def whole(
    request: Request[Any, Any, Any], pool: Pool, asked: GenerationRequest | EmbeddingRequest
) -> tuple[list[Piece], Generation]:
    """Return every choice as one piece, and the generation for its counts.

    Raises the pool's errors, and ClientGoneError when the client goes first; the slot is free then.
    """
    exchange = exchange_of(request.scope)
    generation = await unless_gone(request.receive, pool.open(asked), Generation.aclose)
    try:
        pieces = await unless_gone(request.receive, generation.collect())
    finally:
        await generation.aclose()
        _count(exchange, generation)
    return pieces, generation


async def stream(
    request: Request[Any, Any, Any],
    pool: Pool,
    asked: GenerationRequest,
    chunks: sse.Chunks,
    headers: dict[str, str],
) -> sse.EventStream:
    """Return a response that streams; whatever can fail before the HTTP status has then succeeded."""
    exchange = exchange_of(request.scope)
    generation = await unless_gone(request.receive, pool.open(asked), Generation.aclose)
    chunks.opened(generation)
    generation.listen(functools.partial(_pass_on, generation, chunks, exchange))
    return sse.EventStream(_events(generation, chunks, exchange), headers, generation.aclose)


def _pass_on(generation: Generation, chunks: sse.Chunks, exchange: Exchange) -> bool:
    """Send what there is at once, unless the client doesn't keep up; return whether that was done."""
    if exchange.is_paused():
        return False
    try:
        if events := chunks.encode(generation.take()):
            exchange.send_part_at_once(events)
    except Exception as error:  # must not reach the worker's link, which is everybody's
        token = logging.request_id.set(exchange.request_id)
        generation.fail(unexpected(error))
        logging.request_id.reset(token)
        return False
    return True


async def _events(generation: Generation, chunks: sse.Chunks, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream: everything there is, at once; an error is the last of them."""
    try:
        if opening := chunks.first():
            yield opening
        async for updates in generation:
            if events := chunks.encode(updates):
                yield events
        yield chunks.end(usage(generation))
    except PestleError as error:
        exchange.error_code = error.code or error.type
        yield sse.event(error_document(error))
    except Exception as error:  # the status is sent: what remains is to say so in the stream
        yield sse.event(error_document(unexpected(error)))
    finally:
        await generation.aclose()
        _count(exchange, generation)


def _count(exchange: Exchange, generation: Generation) -> None:
    exchange.fields |= generation.summary()
