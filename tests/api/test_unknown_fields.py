"""`--unknown-fields warn`: what nobody knows is left out, and said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from app.config import ServeSettings
from tests.api.conftest import EdgeServer
from tests.api.wire import CHAT, MODEL, chat, error_of


@pytest.fixture
def lenient() -> Iterator[EdgeServer]:
    with EdgeServer(ServeSettings(unknown_fields="warn")) as server:
        yield server


def test_refused_unless_told_otherwise(edge: EdgeServer) -> None:
    status, headers, body = edge.post(CHAT, chat(num_ctx=1))
    assert (status, error_of(body)["param"], error_of(body)["code"]) == (400, "num_ctx", "unknown_parameter")
    assert "x-pestle-unknown-fields" not in headers


@pytest.mark.parametrize("stream", [False, True])
def test_left_out_and_named(lenient: EdgeServer, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"role": "user", "content": "a", "tag": 1}, {"role": "user", "content": "b", "tag": 2}]
    body = chat(num_ctx=1, mirostat=2, messages=messages, stream=stream, max_tokens=3)
    with caplog.at_level("WARNING"):
        status, headers, _ = lenient.post(CHAT, body)
    assert status == 200
    assert sorted(headers["x-pestle-unknown-fields"].split(", ")) == ["messages.tag", "mirostat", "num_ctx"]
    assert [record for record in caplog.records if "nobody knows" in record.getMessage()]
    (asked,) = lenient.pool.requests
    assert asked.max_tokens == 3


def test_known_fields_are_still_checked(lenient: EdgeServer) -> None:
    status, headers, body = lenient.post(CHAT, chat(num_ctx=1, temperature=9))
    assert (status, error_of(body)["param"]) == (400, "temperature")
    assert headers["x-pestle-unknown-fields"] == "num_ctx"


def test_nothing_to_say(lenient: EdgeServer) -> None:
    assert "x-pestle-unknown-fields" not in lenient.post(CHAT, chat())[1]


@pytest.mark.parametrize("name", ["a\r\nx: y", "ü" * 200, "", "a.b", "$", "`"])
def test_odd_names(lenient: EdgeServer, name: str) -> None:
    status, headers, _ = lenient.post(CHAT, chat(**{name: 1}))
    assert status in {200, 400}
    assert "x" not in headers
    if status == 200:
        assert "x-pestle-unknown-fields" in headers


def test_there_is_an_end(lenient: EdgeServer) -> None:
    many: dict[str, Any] = {f"field_{number}": number for number in range(40)}
    status, _, body = lenient.post(CHAT, chat(**many))
    assert (status, error_of(body)["code"]) == (400, "unknown_parameter")


def test_other_routes_too(lenient: EdgeServer) -> None:
    status, headers, _ = lenient.post(
        "/v1/completions", msgspec.json.encode({"model": MODEL, "prompt": "a", "num_ctx": 3})
    )
    assert (status, headers["x-pestle-unknown-fields"]) == (200, "num_ctx")


def test_what_no_number_can_be_is_refused_all_the_same(lenient: EdgeServer) -> None:
    body = b'{"model":"%s","messages":[{"role":"user","content":"a"}],"foo":1,"metadata":{"a":1e999}}' % MODEL.encode()
    status, _, answer = lenient.post(CHAT, body)
    assert status == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_a_field_is_left_out_where_it_is_unknown_only(lenient: EdgeServer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "b", "tool_call_id": "c"},
        {"role": "user", "content": "d", "tool_call_id": None, "tool_calls": []},
    ]
    status, headers, _ = lenient.post(CHAT, chat(messages=messages, max_tokens=3))
    assert status == 200
    assert sorted(headers["x-pestle-unknown-fields"].split(", ")) == ["messages.tool_call_id", "messages.tool_calls"]
    (asked,) = lenient.pool.requests
    (prompt,) = asked.prompts
    assert [message.get("tool_calls") is not None for message in prompt.messages] == [False, True, False, False]
