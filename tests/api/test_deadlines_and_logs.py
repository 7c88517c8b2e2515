"""Deadlines of clients, the access log, and counts that equal the clients'; with a real server."""

from __future__ import annotations

import concurrent.futures
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.conftest import EdgeServer, eventually
from tests.api.wire import CHAT, chat, error_of
from tests.conftest import RunningServer, ServerFactory

SECRET = "confidential words"


@pytest.fixture(scope="module")
def running(bytes_model: Path, serve: ServerFactory) -> Iterator[RunningServer]:
    with serve(bytes_model, "--parallel", "4", "--ctx-size", "1024", "--queue", "100") as running:
        yield running


@pytest.fixture(scope="module")
def client(running: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=100) as client:
        yield client


def access_line(running: RunningServer, request_id: str) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in list(running.stderr) if line.startswith("{"))
        return [line for line in lines if line["message"] == "request" and line.get("request_id") == request_id]

    eventually(found)
    return found()[0]


def metric(running: RunningServer, name: str) -> float:
    with urllib.request.urlopen(f"{running.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    found = re.search(rf"^pestle_{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    assert found
    return float(found[1])


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_tells_how_it_went_and_nothing_of_what_was_said(
    client: openai.OpenAI, running: RunningServer, stream: bool
) -> None:
    answer: Any = client.completions.with_raw_response.create(
        model="Tiny-Bytes-F32",
        prompt=SECRET,
        max_tokens=5,
        extra_body={"ignore_eos": True},
        stream=stream,
    )
    list(answer.parse()) if stream else answer.parse()
    line = access_line(running, answer.headers["x-request-id"])
    assert (line["model"], line["status"], line["path"]) == ("Tiny-Bytes-F32", 200, "/v1/completions")
    assert (line["completion_tokens"], line["finish_reason"]) == (5, "length")
    assert 0 <= line["cached_tokens"] < line["prompt_tokens"]
    assert line["prompt_tokens"] >= 10
    assert 0 <= line["queue_seconds"] <= line["ttft_seconds"] <= line["seconds"]
    assert not [text for text in running.stderr if "confidential" in text]


def test_sums_are_what_clients_counted(client: openai.OpenAI, running: RunningServer) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total")
    before = [metric(running, name) for name in names]

    def ask(number: int) -> tuple[int, int]:
        options: dict[str, Any] = {
            "model": "Tiny-Bytes-F32",
            "prompt": [f"{number} times {number}"] * (1 + number % 2),
            "max_tokens": 1 + number,
            "n": 1 + number % 3,
            "extra_body": {"ignore_eos": number % 2 == 0},
        }
        if number % 4 == 0:
            chunks = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
            usage = list(chunks)[-1].usage
        else:
            usage = client.completions.create(**options).usage
        assert usage is not None
        return usage.prompt_tokens, usage.completion_tokens

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        counted = list(threads.map(ask, range(40)))
    after = [metric(running, name) for name in names]
    grown = [new - old for old, new in zip(before, after, strict=True)]
    assert grown == [sum(column) for column in zip(*counted, strict=True)]


def test_who_would_wait_in_vain_is_told_at_once(client: openai.OpenAI) -> None:
    def ask(seconds: str, **more: Any) -> Any:
        return client.completions.create(
            model="Tiny-Bytes-F32",
            prompt="abc",
            max_tokens=900,
            extra_headers={"x-request-timeout": seconds},
            extra_body={"ignore_eos": True, **more},
        )

    ask("600")  # many steps are measured
    with pytest.raises(openai.BadRequestError, match=r"900 tokens of the answer.*you wait 0\.001 s") as caught:
        ask("1ms")
    assert (caught.value.code, caught.value.param) == ("deadline_too_short", "x-request-timeout")
    assert ask("600s").usage.completion_tokens == 900
    assert ask("1ms", ignore_eos=False, stop=["zzz"], max_tokens=1).choices


def test_the_sdks_own_header_counts(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            model="Tiny-Bytes-F32",
            prompt="abc",
            max_tokens=900,
            extra_headers={"x-stainless-read-timeout": "0.001"},
            extra_body={"ignore_eos": True},
        )
    assert caught.value.param == "x-stainless-read-timeout"


@pytest.mark.parametrize("value", ["soon", "-1", "0", "", "1h", "nan", "1e3", "9" * 30])
def test_a_header_that_is_no_duration(edge: EdgeServer, value: str) -> None:
    status, _, body = edge.post(CHAT, chat(), x_request_timeout=value)
    assert (status, error_of(body)["param"]) == (400, "x-request-timeout")
    assert edge.post(CHAT, chat(), x_stainless_read_timeout=value)[0] == 200


@pytest.mark.parametrize(("value", "seconds"), [("30", 30), ("2.5s", 2.5), ("500ms", 0.5), (" 7 ", 7)])
def test_durations(edge: EdgeServer, value: str, seconds: float) -> None:
    edge.post(CHAT, chat(), x_request_timeout=value, x_stainless_read_timeout="600")
    (asked,) = edge.pool.requests
    assert asked.patience is not None
    assert (asked.patience.header, asked.patience.seconds) == ("x-request-timeout", seconds)
