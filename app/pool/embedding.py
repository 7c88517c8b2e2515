"""Requests for embeddings and scores: their inputs to tokens, each checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable

from app.errors import ContextLengthError, RequestError, WrongModelError
from app.messages import MAX_FRAME_BYTES, Capability, Embed, Hello, RenderInputs, RenderPairs
from app.pool.context_check import check_ids, token_bytes
from app.pool.request import EmbeddingRequest, GenerationRequest, ModelInfo, Pairs
from app.pool.text_client import TextClient

_TOKEN_BYTES = _NUMBER_BYTES = 4
_ROUTES: dict[Capability, str] = {
    "chat": "POST /v1/chat/completions",
    "completion": "POST /v1/completions",
    "embeddings": "POST /v1/embeddings",
    "rerank": "POST /v1/rerank",
}


def capabilities(worker: Hello, *, fills_in: bool) -> tuple[Capability, ...]:
    """Return what a model is for; `fills_in`: its vocabulary has tokens for filling in the middle."""
    generates = "completion" in worker.capabilities
    return (*worker.capabilities, "infill") if generates and fills_in else tuple(worker.capabilities)


def check_capability(request: GenerationRequest | EmbeddingRequest, model: ModelInfo) -> None:
    """Raise WrongModelError when the model is not for such requests; it names the route of what the model is for."""
    if isinstance(request, GenerationRequest):
        wanted: Capability = "completion"
        doing = "continue text"
    elif isinstance(request.inputs, Pairs):
        wanted, doing = "rerank", "score documents against a query"
    else:
        wanted, doing = "embeddings", "give embeddings"
    if wanted in model.capabilities:
        return
    routes = " and ".join(_ROUTES[capability] for capability in model.capabilities if capability in _ROUTES)
    hint = ""
    if wanted == "embeddings" and "completion" in model.capabilities:
        hint = "; started with --pooling, the server makes embeddings of a generative model"
    raise WrongModelError(f"the model {model.id!r} does not {doing}: it is for {routes}{hint}", param="model")


async def embed_command(
    request: EmbeddingRequest, text: TextClient, number: Callable[[], int], model: ModelInfo, vocabulary_size: int
) -> Embed:
    """Return the worker's command: every input tokenized, and none too long.

    Raises RequestError that names the field or the input, ContextLengthError with the numbers, and what the text child
    refuses.
    """
    size = model.embedding_size
    if request.dimensions is not None and request.dimensions > size:
        raise RequestError(
            f"'dimensions' is {request.dimensions}, and this model's embeddings have {size}: send {size} or less",
            param="dimensions",
        )
    _check_size(request, request.dimensions or size)
    inputs = await _tokens(request, text, number(), vocabulary_size)
    for index, tokens in enumerate(inputs):
        _check_length(len(tokens) // _TOKEN_BYTES, model.context_length, _input_name(request, index))
    return Embed(
        request=number(),
        inputs=inputs,
        dimensions=request.dimensions or 0,
        activation=request.activation,
        client=request.client,
    )


def count_tokens(command: Embed) -> int:
    """Return the tokens of all inputs."""
    return sum(map(len, command.inputs)) // _TOKEN_BYTES


async def _tokens(request: EmbeddingRequest, text: TextClient, number: int, vocabulary_size: int) -> list[bytes]:
    inputs = request.inputs
    if isinstance(inputs, Pairs):
        return await text.render_inputs(RenderPairs(number, inputs.query, inputs.documents))
    texts = [item for item in inputs if isinstance(item, str)]
    if texts:
        return await text.render_inputs(RenderInputs(number, texts))
    found = []
    for index, ids in enumerate(inputs):
        assert isinstance(ids, list)  # noqa: S101 - the schema lets no mixture through
        check_ids(ids, vocabulary_size, _input_name(request, index))
        found.append(token_bytes(ids))
    return found


def _check_size(request: EmbeddingRequest, size: int) -> None:
    """Raise RequestError when the answer would be larger than a frame may be, with room to spare."""
    if isinstance(request.inputs, Pairs):
        return
    most = MAX_FRAME_BYTES // 2 // (size * _NUMBER_BYTES)
    if len(request.inputs) > most:
        raise RequestError(
            f"'input' has {len(request.inputs)} inputs, for embeddings of {size} numbers each: send at most {most}",
            param="input",
        )


def _check_length(count: int, context_length: int, param: str) -> None:
    if not count:
        raise RequestError(f"'{param}' has no tokens: send some text", param=param)
    if count > context_length:
        raise ContextLengthError(
            f"this model's maximum context length is {context_length} tokens, and '{param}' has {count}; split or "
            "shorten it, nothing is cut off here",
            param=param,
        )


def _input_name(request: EmbeddingRequest, index: int) -> str:
    if isinstance(request.inputs, Pairs):
        return f"documents[{index}]"
    return "input" if request.single else f"input[{index}]"
