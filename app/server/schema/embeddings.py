"""The bodies of POST /v1/embeddings and POST /v1/rerank, and their answers."""

from __future__ import annotations

import base64
import sys
import uuid
from array import array
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.errors import RequestError
from app.pool.request import EmbeddingRequest, Pairs
from app.server.schema.common import TokenId
from app.server.schema.decode import decode
from app.server.schema.embedding_fields import EMBEDDINGS, MAX_INPUTS, RERANK
from app.server.schema.fields import refuse_what_would_change_the_answer, without_effect

_MODEL = Annotated[str, Meta(min_length=1, max_length=512)]
_FLOAT_BYTES = 4


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/embeddings; what becomes of each field stands in `embedding_fields.EMBEDDINGS`."""

    model: _MODEL
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    user: str | None = None
    embd_normalize: Any = None
    normalize: Any = None
    truncate_prompt_tokens: Any = None

    def embedding_request(self, request_id: str, client: str = "") -> EmbeddingRequest:
        """Return what to ask the pool for; raises RequestError for an input of no known shape."""
        return EmbeddingRequest(
            inputs=self._inputs(),
            single=self._is_single(),
            dimensions=self.dimensions,
            request_id=request_id,
            client=client,
        )

    @property
    def count(self) -> int:
        """The number of inputs."""
        return 1 if self._is_single() else len(self.input)

    def names_without_effect(self) -> list[str]:
        """Return the names of the fields that were sent and cannot change the answer."""
        return without_effect(self, EMBEDDINGS)

    def _is_single(self) -> bool:
        return isinstance(self.input, str) or (bool(self.input) and isinstance(self.input[0], int))

    def _inputs(self) -> list[str] | list[list[int]]:
        given = self.input
        if isinstance(given, str):
            return [given]
        takes = EMBEDDINGS["input"].takes
        if not given:
            raise RequestError(f"'input' is empty; it takes {takes}", param="input")
        kind = type(given[0])
        for index, item in enumerate(given):
            param = f"input[{index}]"
            if type(item) is not kind:
                raise RequestError(f"'{param}' is of another kind than 'input[0]'; it takes {takes}", param=param)
            if item == []:
                raise RequestError(f"'{param}' is empty: send at least one token id", param=param)
        if kind is int:
            return [[item for item in given if isinstance(item, int)]]
        if len(given) > MAX_INPUTS:
            raise RequestError(f"'input' has {len(given)} inputs: send at most {MAX_INPUTS}", param="input")
        if kind is str:
            return [item for item in given if isinstance(item, str)]
        return [item for item in given if isinstance(item, list)]


class DocumentObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document as Jina's and Cohere's clients may send it."""

    text: str


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/rerank; what becomes of each field stands in `embedding_fields.RERANK`."""

    model: _MODEL
    query: str
    documents: Annotated[list[str | DocumentObject], Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    return_documents: bool | None = None
    use_activation: bool | None = None
    user: str | None = None
    truncate_prompt_tokens: Any = None
    max_tokens_per_doc: Any = None
    max_chunks_per_doc: Any = None
    rank_fields: Any = None

    def embedding_request(self, request_id: str, client: str = "") -> EmbeddingRequest:
        """Return what to ask the pool for."""
        return EmbeddingRequest(
            inputs=Pairs(self.query, self.texts()),
            activation=self.use_activation is not False,
            request_id=request_id,
            client=client,
        )

    def texts(self) -> list[str]:
        """Return the documents as strings."""
        return [item if isinstance(item, str) else item.text for item in self.documents]

    def names_without_effect(self) -> list[str]:
        """Return the names of the fields that were sent and cannot change the answer."""
        return without_effect(self, RERANK)


_embeddings_decoder = msgspec.json.Decoder(EmbeddingsRequest, strict=True)
_rerank_decoder = msgspec.json.Decoder(RerankRequest, strict=True)


def decode_embeddings(body: bytes) -> EmbeddingsRequest:
    """Return the body as a request. Raises RequestError or one of its kin, each naming the field."""
    request = decode(body, _embeddings_decoder, EMBEDDINGS)
    refuse_what_would_change_the_answer(request, EMBEDDINGS)
    return request


def decode_rerank(body: bytes) -> RerankRequest:
    """Return the body as a request. Raises RequestError or one of its kin, each naming the field."""
    request = decode(body, _rerank_decoder, RERANK)
    refuse_what_would_change_the_answer(request, RERANK)
    return request


def embedding_list(asked: EmbeddingsRequest, model: str, vectors: bytes, prompt_tokens: int) -> bytes:
    """Return the body of the answer; `vectors` are those of all inputs, float32, little-endian."""
    as_text = asked.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if as_text else floats(vector)}
        for index, vector in enumerate(_split(vectors, asked.count))
    ]
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": _usage(prompt_tokens)})


def ranking(asked: RerankRequest, model: str, vectors: bytes, prompt_tokens: int) -> bytes:
    """Return the body of the answer: the best first, of equals the one that was sent first."""
    texts = asked.texts()
    scores = floats(vectors)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: asked.top_n]
    shows = asked.return_documents is not False
    results = [
        {"index": index, "relevance_score": scores[index]} | ({"document": {"text": texts[index]}} if shows else {})
        for index in order
    ]
    return msgspec.json.encode(
        {
            "id": f"rerank-{uuid.uuid4().hex}",
            "object": "list",
            "model": model,
            "results": results,
            "usage": _usage(prompt_tokens),
        }
    )


def floats(vector: bytes) -> list[float]:
    """Return the numbers of a float32 little-endian array."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _split(vectors: bytes, count: int) -> list[bytes]:
    size = len(vectors) // count
    assert size % _FLOAT_BYTES == 0  # noqa: S101 - the worker sends whole vectors
    return [vectors[start : start + size] for start in range(0, len(vectors), size)]


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")


def _usage(prompt_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
