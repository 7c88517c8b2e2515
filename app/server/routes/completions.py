"""POST /v1/completions."""

from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler

from app.messages import Piece
from app.observability.metrics import Metrics
from app.pool.generation import Generation
from app.pool.pool import Pool
from app.server import answer, sse
from app.server.schema import responses
from app.server.schema.completions import CompletionRequest, decode_completion
from app.server.schema.echo import EchoedChoice, best
from app.server.schema.responses import Identity, TextLogprobs
from app.server.timings import TimedChunks, timings


def handler(pool: Pool, metrics: Metrics) -> HTTPRouteHandler:
    """Return the route."""

    @post("/v1/completions", status_code=200)
    async def completions(request: Request[Any, Any, Any]) -> Response[Any]:
        completion, model, asked = await answer.read(request, pool, metrics, decode_completion)
        headers = answer.no_effect_header(completion.names_without_effect())
        identity = responses.new_identity("cmpl", model)
        if not completion.stream:
            pieces, generation = await answer.whole(request, pool, asked)
            return answer.json(_whole(identity, completion, pieces, generation), headers)
        kind = sse.EchoChunks if completion.echo else sse.TextChunks
        choices, top = len(asked.prompts) * asked.n, bool(completion.logprobs)
        chunks: sse.Chunks = kind(identity, choices, include_usage=completion.include_usage, top=top)
        chunks = TimedChunks(chunks) if completion.timings_per_token else chunks
        return await answer.stream(request, pool, asked, chunks, headers)

    return completions


def _whole(identity: Identity, asked: CompletionRequest, pieces: list[Piece], generation: Generation) -> bytes:
    extra = {"timings": timings(pieces, generation)} if asked.timings_per_token else None
    candidates, n = asked.candidates, asked.n or 1
    if candidates > n:
        pieces = best(pieces, candidates, n)
    choices = []
    for index, piece in enumerate(pieces):
        logprobs = TextLogprobs(top=bool(asked.logprobs))
        echoed = EchoedChoice(generation.echoes[index // n], logprobs).take(piece) if asked.echo else piece
        choices.append((_as_asked(echoed or piece, asked), logprobs))
    return responses.text_completion(identity, choices, generation, extra)


def _as_asked(piece: Piece, asked: CompletionRequest) -> Piece:
    """Return the piece without the log probabilities that only the choice of the best needed."""
    return piece if asked.logprobs is not None else msgspec.structs.replace(piece, logprobs=None)
