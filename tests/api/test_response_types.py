"""Every response, streamed chunks too, is of the types of the `openai` package, strictly; what is more is known."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ValidationError

from tests.conftest import ServerFactory

MODEL = "Tiny-Bytes-F32"
MESSAGES = [{"role": "user", "content": "Hello, wörld"}]
MODEL_FIELDS = {
    "architecture",
    "bytes",
    "capabilities",
    "card",
    "context_length",
    "description",
    "file_bytes",
    "parameters",
    "ready",
    "slots",
    "trained_context_length",
    "type",
    "vocabulary_size",
}
VARIATIONS: list[dict[str, Any]] = [
    {},
    {"n": 2, "seed": 1},
    {"stop": ["a", "e"], "temperature": 0},
    {"ignore_eos": True},
    {"timings_per_token": True},
    {"json_schema": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
]


@pytest.fixture(scope="module")
def url(bytes_model: Path, serve: ServerFactory) -> Iterator[str]:
    with serve(bytes_model, "--parallel", "2", "--ctx-size", "512") as running:
        yield running.url


def extras(value: Any) -> set[str]:
    """Return the names of all fields that the types don't have, wherever they are."""
    if isinstance(value, BaseModel):
        found = set(value.model_extra or {})
        for name in type(value).model_fields:
            found |= extras(getattr(value, name))
        return found
    if isinstance(value, list):
        return set().union(*map(extras, value))
    return set()


def fetch(url: str, path: str, document: dict[str, Any] | None = None) -> bytes:
    body = None if document is None else json.dumps({"model": MODEL, **document}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url + path, body, {"content-type": "application/json"}), timeout=100
    ) as response:
        data: bytes = response.read()
        return data


def events(data: bytes) -> list[bytes]:
    parts = data.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [part.removeprefix("data: ").encode() for part in parts[:-2]]


@pytest.mark.parametrize("change", [*VARIATIONS, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2}])
def test_chat(url: str, change: dict[str, Any]) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 12, **change}
    known = {"timings"} if "timings_per_token" in change else set()
    whole = ChatCompletion.model_validate_json(fetch(url, "/v1/chat/completions", asked), strict=True)
    assert extras(whole) <= known
    stream = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    for event in events(fetch(url, "/v1/chat/completions", stream)):
        assert extras(ChatCompletionChunk.model_validate_json(event, strict=True)) <= known


@pytest.mark.parametrize(
    "change", [*VARIATIONS, {"logprobs": 0}, {"logprobs": 2}, {"echo": True}, {"echo": True, "max_tokens": 0}]
)
def test_completions(url: str, change: dict[str, Any]) -> None:
    asked = {"prompt": ["Hello", "wörld"], "max_tokens": 12, **change}
    known = {"timings"} if "timings_per_token" in change else set()
    whole = Completion.model_validate_json(fetch(url, "/v1/completions", asked), strict=True)
    assert extras(whole) <= known
    for event in events(fetch(url, "/v1/completions", {**asked, "stream": True})):
        document = json.loads(event)
        for choice in document["choices"]:  # OpenAI's own chunks have null here as well, against its type
            if choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"
        assert extras(Completion.model_validate_json(json.dumps(document), strict=True)) <= known


def test_an_echo_with_log_probabilities_has_null_first_and_only_there(url: str) -> None:
    document = json.loads(fetch(url, "/v1/completions", {"prompt": "Hello", "echo": True, "logprobs": 1}))
    with pytest.raises(ValidationError):  # the types know no null; OpenAI's API has one, and so have we
        Completion.model_validate(document, strict=True)
    logprobs = document["choices"][0]["logprobs"]
    assert (logprobs["token_logprobs"].pop(0), logprobs["top_logprobs"].pop(0)) == (None, None)
    Completion.model_validate_json(json.dumps(document), strict=True)


def test_models(url: str) -> None:
    document = json.loads(fetch(url, "/v1/models"))
    (item,) = document["data"]
    assert document["object"] == "list"
    for data in (json.dumps(item), fetch(url, f"/v1/models/{item['id']}")):
        assert extras(Model.model_validate_json(data, strict=True)) == MODEL_FIELDS
