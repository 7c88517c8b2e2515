"""Bodies of /v1/embeddings and /v1/rerank become requests, or errors that name the field; and their answers."""

from __future__ import annotations

import asyncio
import struct
import typing
from typing import Any

import msgspec
import pytest
from openai.types import CreateEmbeddingResponse, embedding_create_params

from app.errors import RequestError, UnknownFieldError, UnsupportedFieldError
from app.pool.embedding import embed_command
from app.pool.request import ModelInfo, Pairs
from app.pool.text_client import TextClient
from app.server.schema import embedding_fields as fields
from app.server.schema.embeddings import (
    EmbeddingsRequest,
    RerankRequest,
    decode_embeddings,
    decode_rerank,
    embedding_list,
    ranking,
)

MANY = fields.MAX_INPUTS + 1


def embeddings(**changes: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "input": "Hi", **changes})


def rerank(**changes: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "query": "q", "documents": ["a", "b"], **changes})


def test_every_field_of_openai_is_on_a_list() -> None:
    theirs = set(typing.get_type_hints(embedding_create_params.EmbeddingCreateParams))
    assert "input" in theirs
    assert theirs - set(fields.EMBEDDINGS) == set()


@pytest.mark.parametrize(
    ("request_type", "table"), [(EmbeddingsRequest, fields.EMBEDDINGS), (RerankRequest, fields.RERANK)]
)
def test_the_lists_are_the_structs(request_type: type[msgspec.Struct], table: dict[str, Any]) -> None:
    assert set(request_type.__struct_fields__) == set(table)


@pytest.mark.parametrize(
    ("given", "inputs", "single"),
    [
        ("a", ["a"], True),
        ("", [""], True),
        (["a", "b"], ["a", "b"], False),
        (["a"], ["a"], False),
        ([1, 2], [[1, 2]], True),
        ([[1, 2], [3]], [[1, 2], [3]], False),
        (["x"] * fields.MAX_INPUTS, ["x"] * fields.MAX_INPUTS, False),
    ],
)
def test_shapes_of_the_input(given: object, inputs: list[object], single: bool) -> None:
    body = decode_embeddings(embeddings(input=given))
    request = body.embedding_request("r", "c")
    assert (request.inputs, request.single, request.client) == (inputs, single, "c")
    assert body.count == len(inputs)


BAD_EMBEDDINGS: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "empty"),
    ({"input": None}, "input", "got null"),
    ({"input": 3}, "input", "expected a string or an array"),
    ({"input": {"text": "a"}}, "input", "got an object"),
    ({"input": ["a", 1]}, "input[1]", "another kind"),
    ({"input": [1, "a"]}, "input[1]", "another kind"),
    ({"input": [[1], "a"]}, "input[1]", "another kind"),
    ({"input": [[1], []]}, "input[1]", "at least one token"),
    ({"input": [-1]}, "input[0]", "at least 0"),
    ({"input": [1.5]}, "input[0]", "got a number"),
    ({"input": [True]}, "input[0]", "got true or false"),
    ({"input": [2**31]}, "input[0]", "at most"),
    ({"input": ["a", None]}, "input[1]", "got null"),
    ({"input": ["a"] * MANY}, "input", f"at most {fields.MAX_INPUTS}"),
    ({"input": [[1]] * MANY}, "input", f"at most {fields.MAX_INPUTS}"),
    ({"dimensions": 0}, "dimensions", "at least 1"),
    ({"dimensions": -1}, "dimensions", "at least 1"),
    ({"dimensions": 2**31}, "dimensions", "at most"),
    ({"dimensions": "8"}, "dimensions", "expected an integer"),
    ({"dimensions": 1.5}, "dimensions", "expected an integer"),
    ({"encoding_format": "int8"}, "encoding_format", "'int8'"),
    ({"encoding_format": 1}, "encoding_format", ""),
    ({"model": ""}, "model", "length at least 1"),
    ({"model": None}, "model", "got null"),
    ({"user": 1}, "user", "expected a string"),
    ({"inputs": ["a"]}, "inputs", "did you mean 'input'"),
    ({"input_type": "query"}, "input_type", "no field"),
]


@pytest.mark.parametrize(
    ("changes", "param", "words"), BAD_EMBEDDINGS, ids=[f"{case[1]}-{case[2]}" for case in BAD_EMBEDDINGS]
)
def test_bad_embeddings_name_the_field(changes: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_embeddings(embeddings(**changes)).embedding_request("r")
    assert caught.value.param == param
    assert words in caught.value.message
    assert param in caught.value.message
    assert isinstance(caught.value, UnknownFieldError) == ("no field" in caught.value.message)


BAD_RANKINGS: list[tuple[dict[str, Any], str]] = [
    ({"query": None}, "query"),
    ({"query": ["q"]}, "query"),
    ({"documents": []}, "documents"),
    ({"documents": "a"}, "documents"),
    ({"documents": None}, "documents"),
    ({"documents": ["a", 1]}, "documents[1]"),
    ({"documents": ["a", {"txt": "b"}]}, "documents[1].txt"),
    ({"documents": ["a", {"text": 1}]}, "documents[1].text"),
    ({"documents": ["a"] * MANY}, "documents"),
    ({"top_n": 0}, "top_n"),
    ({"top_n": "1"}, "top_n"),
    ({"return_documents": 1}, "return_documents"),
    ({"use_activation": "no"}, "use_activation"),
    ({"texts": ["a"]}, "texts"),
]


@pytest.mark.parametrize(("changes", "param"), BAD_RANKINGS, ids=[str(case[0])[:40] for case in BAD_RANKINGS])
def test_bad_rankings_name_the_field(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_rerank(rerank(**changes)).embedding_request("r")
    assert caught.value.param == param


@pytest.mark.parametrize("name", [name for name, field in fields.EMBEDDINGS.items() if field.use == "refused"])
def test_refused_fields(name: str) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        decode_embeddings(embeddings(**{name: 5}))
    assert caught.value.param == name
    for neutral in fields.EMBEDDINGS[name].neutral:
        assert decode_embeddings(embeddings(**{name: neutral})).names_without_effect() == []


@pytest.mark.parametrize("name", [name for name, field in fields.RERANK.items() if field.use == "refused"])
def test_refused_fields_of_a_ranking(name: str) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        decode_rerank(rerank(**{name: 5}))
    assert caught.value.param == name


def test_an_answer_that_no_frame_could_hold_is_refused_before_anything_is_computed() -> None:
    model = ModelInfo(id="m", created=0, context_length=8, capabilities=("embeddings",), embedding_size=8192)
    request = decode_embeddings(embeddings(input=["a"] * 2048)).embedding_request("r")
    with pytest.raises(RequestError, match="send at most 1024") as caught:
        asyncio.run(embed_command(request, TextClient(1.0), iter(range(9)).__next__, model, 100))
    assert caught.value.param == "input"


def test_fields_without_effect_are_named() -> None:
    assert decode_embeddings(embeddings(user="u")).names_without_effect() == ["user"]
    assert decode_rerank(rerank(user="u")).names_without_effect() == ["user"]


def test_documents_may_be_objects() -> None:
    request = decode_rerank(rerank(documents=["a", {"text": "b"}])).embedding_request("r")
    assert request.inputs == Pairs("q", ["a", "b"])
    assert request.activation


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_the_answer_is_openais(encoding: str | None) -> None:
    asked = decode_embeddings(embeddings(input=["a", "b"], encoding_format=encoding))
    answer = embedding_list(asked, "m", struct.pack("<4f", 0.5, -0.25, 1, 0), 7)
    if encoding == "base64":
        data = msgspec.json.decode(answer)["data"]
        assert [item["embedding"] for item in data] == ["AAAAPwAAgL4=", "AACAPwAAAAA="]
        return
    parsed = CreateEmbeddingResponse.model_validate_json(answer, strict=True)
    assert [(item.index, item.object, item.embedding) for item in parsed.data] == [
        (0, "embedding", [0.5, -0.25]),
        (1, "embedding", [1.0, 0.0]),
    ]
    assert (parsed.object, parsed.model) == ("list", "m")
    assert (parsed.usage.prompt_tokens, parsed.usage.total_tokens) == (7, 7)


@pytest.mark.parametrize(
    ("changes", "order", "documents"),
    [
        ({}, [2, 0, 3, 1], True),
        ({"top_n": 2}, [2, 0], True),
        ({"top_n": 9, "return_documents": True}, [2, 0, 3, 1], True),
        ({"return_documents": False}, [2, 0, 3, 1], False),
    ],
)
def test_the_best_come_first(changes: dict[str, Any], order: list[int], documents: bool) -> None:
    asked = decode_rerank(rerank(documents=["a", "b", {"text": "c"}, "d"], **changes))
    answer = msgspec.json.decode(ranking(asked, "m", struct.pack("<4f", 0.5, 0.25, 0.75, 0.5), 9))
    assert [result["index"] for result in answer["results"]] == order
    assert [result["relevance_score"] for result in answer["results"]] == [[0.5, 0.25, 0.75, 0.5][i] for i in order]
    texts = [result.get("document") for result in answer["results"]]
    assert texts == [{"text": "abcd"[i]} if documents else None for i in order]
    assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert answer["model"] == "m"
    assert answer["id"].startswith("rerank-")
