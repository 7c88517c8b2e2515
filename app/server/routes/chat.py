"""POST /v1/chat/completions."""

from functools import partial
from typing import Any

from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler

from app.observability.metrics import Metrics
from app.pool.pool import Pool
from app.server import answer, sse
from app.server.parsed_chat import ParsedChatChunks, message, reading_of
from app.server.schema import responses
from app.server.schema.chat import decode_chat
from app.server.timings import TimedChunks, timings


def handler(pool: Pool, metrics: Metrics) -> HTTPRouteHandler:
    """Return the route."""

    @post("/v1/chat/completions", status_code=200)
    async def chat_completions(request: Request[Any, Any, Any]) -> Response[Any]:
        chat, model, asked = await answer.read(request, pool, metrics, decode_chat)
        headers = answer.no_effect_header(chat.names_without_effect(model))
        reading = reading_of(model, asked)
        identity = responses.new_identity("chatcmpl", model)
        if not chat.stream:
            pieces, generation = await answer.whole(request, pool, asked)
            read = responses.plain_message if reading is None else partial(message, reading, generation)
            extra = {"timings": timings(pieces, generation)} if chat.timings_per_token else None
            return answer.json(responses.chat_completion(identity, pieces, generation, read, extra), headers)
        chunks: sse.Chunks
        if reading is None:
            chunks = sse.ChatChunks(identity, asked.n, include_usage=chat.include_usage)
        else:
            chunks = ParsedChatChunks(identity, asked.n, reading, include_usage=chat.include_usage)
        chunks = TimedChunks(chunks) if chat.timings_per_token else chunks
        return await answer.stream(request, pool, asked, chunks, headers)

    return chat_completions
