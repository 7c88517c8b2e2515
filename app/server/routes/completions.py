"""POST /v1/completions."""

from typing import Any

from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler

from app.observability.metrics import Metrics
from app.pool.pool import Pool
from app.server import answer, sse
from app.server.schema import responses
from app.server.schema.completions import decode_completion


def handler(pool: Pool, metrics: Metrics) -> HTTPRouteHandler:
    """Return the route."""

    @post("/v1/completions", status_code=200)
    async def completions(request: Request[Any, Any, Any]) -> Response[Any]:
        completion, model, asked = await answer.read(request, pool, metrics, decode_completion)
        headers = answer.no_effect_header(completion.names_without_effect())
        identity = responses.new_identity("cmpl", model)
        top = bool(completion.logprobs)
        if not completion.stream:
            pieces, generation = await answer.whole(request, pool, asked)
            return answer.json(responses.text_completion(identity, pieces, generation, top=top), headers)
        choices = len(asked.prompts) * asked.n
        chunks = sse.TextChunks(identity, choices, include_usage=completion.include_usage, top=top)
        return await answer.stream(request, pool, asked, chunks, headers)

    return completions
