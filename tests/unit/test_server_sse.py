"""The bytes of streamed chunks, and log probabilities in both shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.messages import Piece, TokenLogprob
from app.pool.generation import Update
from app.server import sse
from app.server.schema.responses import Identity, TextLogprobs, chat_logprobs

IDENTITY = Identity("chatcmpl-1", 1700000000, 'mo"del\n', "fp_1")
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
HARD_TEXT = 'quote " backslash \\ newline \n\r tab \t nul \x00 é 中 😀 \u2028 </script>'


def documents(data: bytes) -> list[dict[str, Any]]:
    events = data.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events if event != "data: [DONE]"]


def piece(text: str, tokens: int = 1, **changes: Any) -> Piece:
    return Piece(1, text, tokens, **changes)


@pytest.mark.parametrize("include_usage", [False, True])
def test_chat_chunks(include_usage: bool) -> None:
    chunks = sse.ChatChunks(IDENTITY, 2, include_usage=include_usage)
    updates = [Update(0, piece(HARD_TEXT)), Update(1, piece("x", finish_reason="stop"))]
    data = chunks.first() + chunks.encode(updates) + chunks.end(USAGE)
    assert data.endswith(b"data: [DONE]\n\n")
    events = documents(data)
    for event in events:
        assert {name: event[name] for name in ("id", "object", "created", "model", "system_fingerprint")} == {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1700000000,
            "model": 'mo"del\n',
            "system_fingerprint": "fp_1",
        }
    if include_usage:
        last = events.pop()
        assert (last["choices"], last["usage"]) == ([], USAGE)
        assert all(event["usage"] is None for event in events)
    else:
        assert all("usage" not in event for event in events)
    opening = {"role": "assistant", "content": ""}
    assert [event["choices"] for event in events] == [
        [{"index": 0, "delta": opening, "logprobs": None, "finish_reason": None}],
        [{"index": 1, "delta": opening, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": HARD_TEXT}, "logprobs": None, "finish_reason": None}],
        [{"index": 1, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None}],
        [{"index": 1, "delta": {}, "logprobs": None, "finish_reason": "stop"}],
    ]


def test_text_chunks() -> None:
    chunks = sse.TextChunks(IDENTITY, 1, include_usage=False, top=False)
    updates = [Update(0, piece(HARD_TEXT, finish_reason="length"))]
    events = documents(chunks.first() + chunks.encode(updates) + chunks.end(USAGE))
    assert {event["object"] for event in events} == {"text_completion"}
    assert [event["choices"] for event in events] == [
        [{"index": 0, "text": HARD_TEXT, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}],
    ]


def test_held_back_text_makes_no_event() -> None:
    chunks = sse.ChatChunks(IDENTITY, 1, include_usage=False)
    assert chunks.encode([Update(0, piece(""))]) == b""


def test_logprobs_of_held_back_text_are_not_lost() -> None:
    chunks = sse.ChatChunks(IDENTITY, 1, include_usage=False)
    (event,) = documents(chunks.encode([Update(0, piece("", logprobs=[TokenLogprob(5, b"\xe2", -0.5)]))]))
    choice = event["choices"][0]
    assert choice["delta"] == {"content": ""}
    assert choice["logprobs"]["content"] == [{"token": "�", "logprob": -0.5, "bytes": [0xE2], "top_logprobs": []}]


def test_chat_logprobs_are_finite() -> None:
    item = TokenLogprob(5, b"a", -0.25, [(5, b"a", -0.25), (6, b"b", float("-inf"))])
    (token,) = chat_logprobs([item])["content"]
    assert token["top_logprobs"] == [
        {"token": "a", "logprob": -0.25, "bytes": [97]},
        {"token": "b", "logprob": -9999.0, "bytes": [98]},
    ]


def test_text_logprobs_count_characters_over_pieces() -> None:
    logprobs = TextLogprobs(top=True)
    euro = "€".encode()
    first = logprobs.take(
        [TokenLogprob(1, "né".encode(), -1.0, [(1, "né".encode(), -1.0)]), TokenLogprob(2, euro[:1], -2)]
    )
    second = logprobs.take([TokenLogprob(3, euro[1:], -3.0), TokenLogprob(4, b"z", -4.0, [(9, b"y", -0.1)])])
    assert first["text_offset"] + second["text_offset"] == [0, 2, 2, 3]
    assert first["tokens"] + second["tokens"] == ["né", "bytes:\\xe2", "bytes:\\x82\\xac", "z"]
    assert second["top_logprobs"] == [{"bytes:\\x82\\xac": -3.0}, {"y": -0.1, "z": -4.0}]


def test_text_logprobs_of_equal_texts_keep_the_best() -> None:
    item = TokenLogprob(1, b"a", -0.1, [(1, b"a", -0.1), (2, b"a", -5.0)])
    assert TextLogprobs(top=True).take([item])["top_logprobs"] == [{"a": -0.1}]


def test_text_logprobs_without_alternatives() -> None:
    assert TextLogprobs(top=False).take([TokenLogprob(1, b"a", -0.1)])["top_logprobs"] is None
