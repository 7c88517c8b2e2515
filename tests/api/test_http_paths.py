"""Paths, methods, the page, and whole answers. The engine is scripted."""

from __future__ import annotations

import contextlib
import json
import re
import time
from typing import TYPE_CHECKING

import msgspec
import pytest

from app.errors import EngineCrashedError, QueueFullError, TemplateRefusedError
from app.pool.request import PoolState
from tests.api.wire import CHAT, MODEL, chat, error_of, read_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import EdgeServer


class TestPaths:
    def test_unknown_path(self, edge: EdgeServer) -> None:
        status, _, body = edge.send("GET", "/v2/nothing")
        assert (status, error_of(body)["code"]) == (404, "route_not_found")
        assert "/v2/nothing" in error_of(body)["message"]

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [
            ("GET", CHAT, "OPTIONS, POST"),
            ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
            ("POST", "/v1/models/a/b", "GET, HEAD, OPTIONS"),
            ("POST", "/", "GET, HEAD, OPTIONS"),
            ("BREW", "/health", "GET, HEAD, OPTIONS"),
        ],
    )
    def test_wrong_method(self, edge: EdgeServer, method: str, path: str, allow: str) -> None:
        if method == "BREW":  # llhttp itself knows no such method
            with edge.connect(b"BREW /health HTTP/1.1\r\n\r\n") as connection:
                head, _, body = read_all(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            error_of(body)
            return
        status, headers, body = edge.send(method, path)
        assert (status, error_of(body)["code"]) == (405, "method_not_allowed")
        assert headers["allow"] == allow

    def test_models(self, edge: EdgeServer) -> None:
        status, _, body = edge.send("GET", "/v1/models")
        (model,) = json.loads(body)["data"]
        assert (status, model["id"], model["object"], model["owned_by"]) == (200, MODEL, "model", "pestle")
        for path in (f"/v1/models/{MODEL}", f"/v1/models/{MODEL.replace('/', '%2F')}"):
            assert json.loads(edge.send("GET", path)[2]) == model
        status, _, body = edge.send("GET", "/v1/models/other")
        assert (status, error_of(body)["param"]) == (404, "model")

    def test_head_is_get_without_the_body(self, edge: EdgeServer) -> None:
        for path in ("/health", "/livez", "/v1/models", "/metrics", "/", "/nothing"):
            status, headers, body = edge.send("HEAD", path)
            get_status, get_headers, get_body = edge.send("GET", path)
            assert (status, body) == (get_status, b"")
            assert int(headers["content-length"]) == int(get_headers["content-length"]) == len(get_body)

    @pytest.mark.parametrize("state", list(PoolState))
    def test_health(self, edge: EdgeServer, state: PoolState) -> None:
        edge.pool.state = state
        edge.pool.failure = "it broke" if state is PoolState.FAILED else None
        status, headers, body = edge.send("GET", "/health")
        document = json.loads(body)
        assert document["status"] == state.value
        if state is PoolState.READY:
            assert status == 200
        else:
            assert status == 503
            assert int(headers["retry-after"]) >= 1
        assert state is not PoolState.FAILED or document["error"]["message"] == "it broke"
        assert edge.send("GET", "/livez")[0] == 200

    def test_metrics(self, edge: EdgeServer) -> None:
        status, headers, body = edge.send("GET", "/metrics")
        assert status == 200
        assert headers["content-type"].startswith("text/plain; version=")
        assert b"# TYPE pestle_num_requests_running gauge" in body

    def test_refused_requests_are_counted(self, edge: EdgeServer) -> None:
        for body in (b"{", chat(n=99), chat(made_up=1), chat(model="x")):
            edge.post(CHAT, body)
        page = edge.send("GET", "/metrics")[2].decode()
        counted = re.findall(r'pestle_request_failure_total{error_type="(\w+)",model_name="org/scripted"} (\d)', page)
        assert dict(counted) == {"invalid_value": "2", "unknown_parameter": "1", "model_not_found": "1"}

    def test_page(self, edge: EdgeServer) -> None:
        status, headers, body = edge.send("GET", "/")
        assert status == 200
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert headers["cache-control"] == "no-cache"
        assets = re.findall(rb'(?:src|href)="(/?static/[^"]+)"', body)
        assert assets
        for asset in assets:
            status, headers, _ = edge.send("GET", "/" + asset.decode().removeprefix("/"))
            assert status == 200
            assert headers["x-content-type-options"] == "nosniff"
        status, _, body = edge.send("GET", "/", headers={"if-none-match": edge.send("GET", "/")[1]["etag"]})
        assert (status, body) == (304, b"")

    @pytest.mark.parametrize(
        "path", ["/static/", "/static/nothing.js", "/static/../run.py", "/static/%2e%2e/run.py", "/static/..%2frun.py"]
    )
    def test_static_serves_its_own_files_only(self, edge: EdgeServer, path: str) -> None:
        status, _, body = edge.send("GET", path)
        assert status == 404
        error_of(body)


class TestAnswers:
    def test_a_whole_chat(self, edge: EdgeServer) -> None:
        _, _, body = edge.post(CHAT, chat(n=2, logprobs=True))
        document = json.loads(body)
        assert [choice["index"] for choice in document["choices"]] == [0, 1]
        for choice in document["choices"]:
            assert choice["message"] == {"role": "assistant", "content": "Hello, world", "refusal": None}
            assert choice["finish_reason"] == "stop"
            assert [token["token"] for token in choice["logprobs"]["content"]] == ["Hello", ", ", "world"]
        assert document["usage"] == {
            "prompt_tokens": 11,
            "completion_tokens": 6,
            "total_tokens": 17,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        assert document["id"].startswith("chatcmpl-")
        assert document["system_fingerprint"].startswith("fp_")
        assert abs(document["created"] - time.time()) < 60

    def test_the_fingerprint_is_stable(self, edge: EdgeServer) -> None:
        first, second = (json.loads(edge.post(CHAT, chat())[2]) for _ in range(2))
        assert first["system_fingerprint"] == second["system_fingerprint"]
        assert first["id"] != second["id"]

    def test_text_completions_of_several_prompts(self, edge: EdgeServer) -> None:
        body = msgspec.json.encode({"model": MODEL, "prompt": ["a", "b"], "n": 2, "logprobs": 0})
        document = json.loads(edge.post("/v1/completions", body)[2])
        assert [choice["index"] for choice in document["choices"]] == [0, 1, 2, 3]
        assert {choice["text"] for choice in document["choices"]} == {"Hello, world"}
        assert document["choices"][3]["logprobs"]["text_offset"] == [0, 5, 7]


class TestErrors:
    def test_what_opening_raises_is_the_status(self, edge: EdgeServer) -> None:
        edge.pool.open_error = TemplateRefusedError("roles must alternate", param="messages")
        for stream in (False, True):
            status, headers, body = edge.post(CHAT, chat(stream=stream))
            assert (status, error_of(body)["code"]) == (400, "template_refused")
            assert headers["content-type"] == "application/json"
            assert "retry-after" not in headers

    def test_overload_says_when_to_come_back(self, edge: EdgeServer) -> None:
        edge.pool.open_error = QueueFullError("full", retry_after=2.25)
        status, headers, body = edge.post(CHAT, chat(stream=True))
        assert (status, error_of(body)["type"]) == (429, "rate_limit_error")
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2250")

    def test_the_unexpected_is_a_500_without_details(self, edge: EdgeServer) -> None:
        edge.pool.open_error = ValueError("a secret")
        status, _, body = edge.post(CHAT, chat())
        assert (status, error_of(body)["type"]) == (500, "server_error")
        assert b"secret" not in body

    def test_an_error_in_mid_stream_is_the_last_event(self, edge: EdgeServer) -> None:
        edge.pool.error_after_words = EngineCrashedError("the worker died", retry_after=1)
        status, _, body = edge.post(CHAT, chat(stream=True, stream_options={"include_usage": True}))
        events = body.decode().strip().split("\n\n")
        assert status == 200
        assert json.loads(events[-1].removeprefix("data: ")) == {
            "error": {"message": "the worker died", "type": "server_error", "param": None, "code": "engine_crashed"}
        }
        assert "[DONE]" not in body.decode()
        assert not re.search(r'"finish_reason":"', body.decode())
        assert not edge.pool.running

    def test_an_error_under_a_whole_answer_is_its_status(self, edge: EdgeServer) -> None:
        edge.pool.error_after_words = EngineCrashedError("the worker died", retry_after=1)
        status, headers, body = edge.post(CHAT, chat())
        assert (status, error_of(body)["code"], headers["retry-after"]) == (503, "engine_crashed", "1")
        assert not edge.pool.running

    def test_more_sockets_than_descriptors_can_be_spared_for(
        self, edge: EdgeServer, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
    ) -> None:
        monkeypatch.setattr("app.server.protocol.MAX_SOCKETS", 3)
        held = [edge.connect() for _ in range(3)]
        eventually(lambda: edge.connections == 3)
        with edge.connect(timeout=2) as one_more, contextlib.suppress(ConnectionResetError):
            assert one_more.recv(1) == b""
        for connection in held:
            connection.close()
        eventually(lambda: edge.connections == 0)
        assert edge.post(CHAT, chat())[0] == 200

    def test_too_many_connections(
        self, edge: EdgeServer, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
    ) -> None:
        monkeypatch.setattr("app.server.edge.MAX_CONNECTIONS", 3)
        held = [edge.connect() for _ in range(3)]
        eventually(lambda: edge.connections == 3)
        status, headers, body = edge.post(CHAT, chat())
        assert (status, error_of(body)["code"]) == (429, "queue_full")
        assert (headers["retry-after"], headers["connection"]) == ("1", "close")
        assert edge.send("GET", "/health")[0] == 200
        for connection in held:
            connection.close()
        eventually(lambda: edge.connections == 0)
        assert edge.post(CHAT, chat())[0] == 200
