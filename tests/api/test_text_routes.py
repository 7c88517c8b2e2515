"""What needs no weights: /tokenize, /detokenize, /apply-template, the list of models; and what Pestle does not do."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.tiny_models import switching_model
from tests.api.wire import error_of
from tests.conftest import ServerFactory

TEXT = "Hello, wörld 你"


@pytest.fixture(scope="module")
def url(bytes_model: Path, serve: ServerFactory) -> Iterator[str]:
    with serve(bytes_model, "--parallel", "1", "--ctx-size", "256") as running:
        yield running.url


def ask(url: str, path: str, document: Any = None) -> tuple[int, Any]:
    body = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(url + path, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error_of(error.read())


def test_there_and_back(url: str) -> None:
    status, answer = ask(url, "/tokenize", {"content": TEXT})
    assert (status, set(answer)) == (200, {"tokens"})
    assert len(answer["tokens"]) > 5
    assert ask(url, "/detokenize", {"tokens": answer["tokens"]}) == (200, {"content": TEXT})
    assert ask(url, "/detokenize", {"tokens": []}) == (200, {"content": ""})


def test_pieces(url: str) -> None:
    ids = ask(url, "/tokenize", {"content": TEXT})[1]["tokens"]
    pieces = ask(url, "/tokenize", {"content": TEXT, "with_pieces": True})[1]["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    data = b"".join(
        piece["piece"].encode() if isinstance(piece["piece"], str) else bytes(piece["piece"]) for piece in pieces
    )
    assert data.decode() == TEXT
    assert any(isinstance(piece["piece"], list) for piece in pieces)


def test_special_tokens_count_unless_not_wanted(url: str) -> None:
    text = "<|im_start|>"
    assert len(ask(url, "/tokenize", {"content": text})[1]["tokens"]) == 1
    plain = ask(url, "/tokenize", {"content": text, "parse_special": False})[1]["tokens"]
    assert len(plain) > 1
    assert ask(url, "/detokenize", {"tokens": plain}) == (200, {"content": text})


def test_bos_on_demand(sentences_model: Path, serve: ServerFactory) -> None:
    with serve(sentences_model, "--parallel", "1", "--ctx-size", "256") as running:
        without = ask(running.url, "/tokenize", {"content": "the fox"})[1]["tokens"]
        with_bos = ask(running.url, "/tokenize", {"content": "the fox", "add_special": True})[1]["tokens"]
        refused = ask(running.url, "/apply-template", {"messages": [{"role": "user", "content": "a"}]})
        (item,) = ask(running.url, "/v1/models")[1]["data"]
    assert with_bos == [1, *without]
    assert (refused[0], refused[1]["code"]) == (400, "template_refused")
    assert item["capabilities"] == ["completion"]


def test_the_template_alone(url: str) -> None:
    messages = [{"role": "user", "content": "One, "}, {"role": "assistant", "content": "two."}]
    assert ask(url, "/apply-template", {"messages": messages}) == (200, {"prompt": "One, two."})
    model = ask(url, "/v1/models")[1]["data"][0]["id"]
    assert ask(url, "/apply-template", {"messages": messages, "model": model})[0] == 200


@pytest.fixture(scope="module")
def switching(serve: ServerFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(switching_model(tmp_path_factory.mktemp("switching")), "--parallel", "1") as running:
        yield running.url


def test_the_template_shows_tools_as_chats_do(switching: str) -> None:
    model = ask(switching, "/v1/models")[1]["data"][0]["id"]
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "How warm?"}],
        "tools": [{"type": "function", "function": function}],
    }
    status, answer = ask(switching, "/apply-template", body)
    assert status == 200
    assert "get_weather" in answer["prompt"]
    tokens = ask(switching, "/tokenize", {"content": answer["prompt"]})[1]["tokens"]
    chat = ask(switching, "/v1/chat/completions", {**body, "max_tokens": 1})[1]
    assert chat["usage"]["prompt_tokens"] == len(tokens)
    assert ask(switching, "/apply-template", {**body, "tool_choice": "none"}) == (200, {"prompt": "How warm?>"})


def test_the_template_gets_all_that_a_chat_gives_it(switching: str) -> None:
    messages = [{"role": "user", "content": "One, "}, {"role": "assistant", "content": "two."}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "One, two.>"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "think:One, two.>"),
        ({"reasoning_effort": "none", "documents": [{"text": "A fox."}]}, "A fox.;One, two.>"),
        ({"add_generation_prompt": False}, "One, two."),
        ({"continue_final_message": True}, "One, two."),
    ]
    for given, prompt in cases:
        assert ask(switching, "/apply-template", {"messages": messages, **given}) == (200, {"prompt": prompt})
    body = {"messages": messages, "chat_template_kwargs": {"bos_token": "a"}}
    status, error = ask(switching, "/apply-template", body)
    assert (status, error["param"]) == (400, "chat_template_kwargs.bos_token")


@pytest.mark.parametrize(
    ("path", "document", "status", "param"),
    [
        ("/tokenize", {}, 400, "content"),
        ("/tokenize", {"content": 1}, 400, "content"),
        ("/tokenize", {"content": "a", "with_pieces": 1}, 400, "with_pieces"),
        ("/tokenize", {"content": "a", "x": 1}, 400, "x"),
        ("/tokenize", {"content": "a", "model": "none"}, 404, "model"),
        ("/tokenize", {"content": "a" * (1024 * 1024 + 1)}, 400, "content"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [100_000]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {}, 400, "tokens"),
        ("/apply-template", {}, 400, "messages"),
        ("/apply-template", {"messages": []}, 400, "messages"),
        ("/apply-template", {"messages": [{"role": "user", "content": "a"}], "model": "none"}, 404, "model"),
        ("/apply-template", [], 400, None),
    ],
)
def test_what_is_wrong_is_named(url: str, path: str, document: Any, status: int, param: str | None) -> None:
    found, error = ask(url, path, document)
    assert (found, error["param"]) == (status, param)


def test_filling_in_is_a_capability(filling_model: Path, serve: ServerFactory) -> None:
    with serve(filling_model, "--parallel", "1", "--ctx-size", "256") as running:
        (item,) = ask(running.url, "/v1/models")[1]["data"]
    assert "infill" in item["capabilities"]
    assert "completion" in item["capabilities"]


def test_models_tell_what_they_are(url: str, bytes_model: Path) -> None:
    (item,) = ask(url, "/v1/models")[1]["data"]
    assert item["type"] == "f32"
    assert item["file_bytes"] == bytes_model.stat().st_size
    assert item["capabilities"] == ["chat", "completion"]
    assert (item["context_length"], item["trained_context_length"], item["slots"]) == (256, 2048, 1)
    assert item["vocabulary_size"] > 256
    card = item["card"]
    assert card["type"] == "f32"
    assert len(card["sha256"]) == 64
    assert card["quality"] is None
    assert card["source"]["kind"] == "folder"
    assert ask(url, f"/v1/models/{item['id']}") == (200, item)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.retrieve(item["id"])
        assert model.to_dict() == item


def test_a_card_of_another_file_is_not_shown(
    bytes_model: Path, filling_model: Path, serve: ServerFactory, tmp_path: Path
) -> None:
    file = shutil.copy(bytes_model, tmp_path / "model.gguf")
    shutil.copy(filling_model.with_name(filling_model.name + ".card.json"), tmp_path / "model.gguf.card.json")
    with serve(file, "--parallel", "1", "--ctx-size", "256") as running:
        (item,) = ask(running.url, "/v1/models")[1]["data"]
        assert "card" not in item
        assert (item["id"], item["type"]) == ("model", "f32")
    assert any("another file" in line for line in running.stderr)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/v1/audio/speech", "audio"),
        ("/v1/audio/transcriptions", "audio"),
        ("/v1/images/generations", "images"),
        ("/v1/files", "files"),
        ("/v1/files/file-1/content", "files"),
        ("/v1/fine_tuning/jobs", "fine-tuning"),
        ("/v1/batches", "batches"),
        ("/v1/moderations", "moderation"),
        ("/v1/assistants", "assistants"),
        ("/v1/threads/t/runs", "assistants"),
        ("/v1/vector_stores", "vector stores"),
        ("/v1/uploads", "uploads"),
        ("/v1/realtime/sessions", "realtime"),
        ("/v1/videos", "videos"),
    ],
)
def test_what_is_not_done_is_said(url: str, path: str, word: str) -> None:
    for document in (None, {"model": "x"}):
        status, error = ask(url, path, document)
        assert (status, error["code"], error["type"]) == (404, "unsupported_route", "invalid_request_error")
        assert word in error["message"]


def test_the_sdk_hears_it(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for call in (
            lambda: client.images.generate(prompt="a cat", model="m"),
            lambda: client.audio.speech.create(input="a", model="m", voice="alloy"),
            lambda: client.files.create(file=("a.txt", b"a"), purpose="batch"),
            lambda: client.moderations.create(input="a"),
        ):
            with pytest.raises(openai.NotFoundError, match="Pestle serves text models"):
                call()  # type: ignore[no-untyped-call]
