"""What HTTP alone decides: paths, headers, bodies, limits, errors, disconnects. The engine is scripted."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from app.errors import EngineCrashedError, QueueFullError, TemplateRefusedError
from app.pool.request import PoolState
from app.server import limits, protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import EdgeServer

CHAT = "/v1/chat/completions"
MODEL = "org/scripted"


def chat(**changes: Any) -> bytes:
    return msgspec.json.encode({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **changes})


def error_of(body: bytes) -> dict[str, Any]:
    document = json.loads(body)
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = document["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def post_bytes(body: bytes, extra: str = "") -> bytes:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}"
    )
    return head.encode() + b"\r\n" + body


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


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


class TestHeaders:
    def test_the_clients_request_id_is_kept_when_it_is_plain(self, edge: EdgeServer) -> None:
        assert edge.send("GET", "/livez", headers={"x-request-id": "Abc-1.2:3_4"})[1]["x-request-id"] == "Abc-1.2:3_4"
        for odd in ("a b", "x" * 129, "é", '"', ""):
            given = edge.send("GET", "/livez", headers={"x-request-id": odd.encode("latin-1").decode("latin-1")})[1]
            assert re.fullmatch(r"req_[0-9a-f]{32}", given["x-request-id"])

    def test_every_answer_has_an_id_and_nosniff(self, edge: EdgeServer) -> None:
        answers = [edge.send("GET", path) for path in ("/livez", "/", "/nothing", "/v1/models/none")]
        answers += [edge.post(CHAT, chat()), edge.post(CHAT, chat(stream=True)), edge.post(CHAT, b"{")]
        assert all(headers["x-request-id"] for _, headers, _ in answers)
        assert all(headers["x-content-type-options"] == "nosniff" for _, headers, _ in answers)
        assert not any("access-control-allow-origin" in headers or "server" in headers for _, headers, _ in answers)

    def test_the_pool_gets_the_request_id(self, edge: EdgeServer) -> None:
        edge.post(CHAT, chat(), x_request_id="mine")
        assert edge.pool.requests[0].request_id == "mine"

    @pytest.mark.parametrize("stream", [False, True])
    def test_fields_without_effect_are_named(self, edge: EdgeServer, stream: bool) -> None:
        _, headers, _ = edge.post(CHAT, chat(user="u", store=True, stream=stream))
        assert headers["x-pestle-no-effect"] == "user, store"
        assert "x-pestle-no-effect" not in edge.post(CHAT, chat(stream=stream))[1]

    def test_stream_headers(self, edge: EdgeServer) -> None:
        status, headers, _ = edge.post(CHAT, chat(stream=True))
        assert status == 200
        assert headers["content-type"].startswith("text/event-stream")
        assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")

    @pytest.mark.parametrize("length", ["abc", "-1", "+5", "1e3", "5, 6"])
    def test_odd_content_lengths(self, edge: EdgeServer, length: str) -> None:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        with edge.connect(head.encode()) as connection:
            head_bytes, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head_bytes.startswith(b"HTTP/1.1 400 ")
        error_of(body)

    @pytest.mark.parametrize("in_one_line", [True, False])
    @pytest.mark.parametrize("at_once", [True, False])
    def test_headers_over_16_kib(self, edge: EdgeServer, in_one_line: bool, at_once: bool) -> None:
        lines = [b"X-A: " + b"a" * 40_000] if in_one_line else [b"X-%d: %s" % (i, b"a" * 200) for i in range(200)]
        data = b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"\r\n".join(lines) + b"\r\n\r\n"
        with edge.connect() as connection:
            for start in range(0, len(data), len(data) if at_once else 4000):
                try:
                    connection.sendall(data[start : start + (len(data) if at_once else 4000)])
                except OSError:
                    break  # refused already
                time.sleep(0 if at_once else 0.002)
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        error_of(body)

    def test_large_bodies_do_not_count_as_headers(self, edge: EdgeServer) -> None:
        message = {"role": "user", "content": "a" * 100_000}
        data = post_bytes(chat(messages=[message]), "Connection: close\r\n")
        with edge.connect(data[:30]) as connection:
            time.sleep(0.02)
            connection.sendall(data[30:])
            assert read_all(connection).startswith(b"HTTP/1.1 200 ")

    def test_slow_headers_are_cut_off(self, edge: EdgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.2)
        with edge.connect(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow") as connection:
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        error_of(body)
        with edge.connect() as silent:
            assert read_all(silent) == b""

    def test_not_http(self, edge: EdgeServer) -> None:
        with edge.connect(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n") as connection:
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        error_of(body)

    def test_odd_hosts_are_no_server_error(self, edge: EdgeServer) -> None:
        with edge.connect(b"GET /livez HTTP/1.1\r\nHost: a/b?c\r\nConnection: close\r\n\r\n") as connection:
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        error_of(body)


class TestBodies:
    @pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", None])
    def test_accepted_content_types(self, edge: EdgeServer, content_type: str | None) -> None:
        headers = {} if content_type is None else {"content-type": content_type}
        assert edge.send("POST", CHAT, chat(), headers)[0] == 200

    @pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
    def test_refused_content_types(self, edge: EdgeServer, content_type: str) -> None:
        status, _, body = edge.send("POST", CHAT, chat(), {"content-type": content_type})
        assert (status, error_of(body)["code"]) == (415, "content_type")
        assert content_type in error_of(body)["message"]

    def test_compressed_bodies_are_no_json(self, edge: EdgeServer) -> None:
        status, _, body = edge.post(CHAT, gzip.compress(chat()), content_encoding="gzip")
        assert status == 400
        error_of(body)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_bodies_over_2_mib(self, edge: EdgeServer, chunked: bool) -> None:
        large = b'{"x":"' + b"a" * limits.MAX_BODY_BYTES + b'"}'
        body: Any = iter([large[i : i + 65536] for i in range(0, len(large), 65536)]) if chunked else large
        status, _, answer = edge.send("POST", CHAT, body, {"content-type": "application/json"})
        assert (status, error_of(answer)["code"]) == (413, "body_too_large")

    def test_a_huge_announced_body_is_refused_before_it_is_sent(self, edge: EdgeServer) -> None:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
        )
        with edge.connect(head.encode()) as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")

    def test_a_body_of_exactly_2_mib_is_read(self, edge: EdgeServer) -> None:
        body = chat(user="u")
        body = body[:-1] + b" " * (limits.MAX_BODY_BYTES - len(body)) + b"}"
        assert edge.post(CHAT, body)[0] == 200

    def test_chunked_bodies_are_read(self, edge: EdgeServer) -> None:
        pieces = iter([chat()[:20], chat()[20:]])
        assert edge.send("POST", CHAT, pieces, {"content-type": "application/json"})[0] == 200  # type: ignore[arg-type]

    def test_slow_bodies_are_cut_off(self, edge: EdgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
        with edge.connect(post_bytes(chat())[:-5]) as connection:
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert error_of(body)["code"] == "body_timeout"

    def test_unread_bodies_are_not_read_for_ever(
        self, edge: EdgeServer, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
    ) -> None:
        monkeypatch.setattr(protocol, "BODY_SECONDS", 0.2)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 99\r\n\r\n"
        with edge.connect(head.encode()) as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 415 ")
            eventually(lambda: edge.connections == 0)

    def test_connections_are_kept_after_errors(self, edge: EdgeServer) -> None:
        with edge.connect() as connection:
            for body in (b"{", chat(n=99), chat()):
                connection.sendall(post_bytes(body))
                answer = http.client.HTTPResponse(connection, method="POST")
                answer.begin()
                assert answer.status == (200 if body == chat() else 400)
                assert json.loads(answer.read())

    def test_pipelined_requests_are_answered_in_order(self, edge: EdgeServer) -> None:
        requests = [post_bytes(chat()), post_bytes(chat(n=99)), b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n"]
        with edge.connect(b"".join(requests)) as connection:
            statuses = re.findall(rb"HTTP/1.1 (\d+) ", read_all(connection))
        assert statuses == [b"200", b"400", b"200"]

    def test_unknown_model(self, edge: EdgeServer) -> None:
        status, _, body = edge.post(CHAT, chat(model="gpt-4o"))
        error = error_of(body)
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


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


class TestPresence:
    """The client goes or stops reading: the slot is free at once."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("reset", [False, True])
    def test_leaving_frees_the_slot(
        self, edge: EdgeServer, stream: bool, reset: bool, eventually: Callable[..., None]
    ) -> None:
        edge.pool.words, edge.pool.pause = ["x"] * 10_000, 0.01
        connection = edge.connect(post_bytes(chat(stream=stream)))
        eventually(lambda: edge.pool.running)
        if stream:
            connection.recv(100)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        left = time.monotonic()
        connection.close()
        eventually(lambda: not edge.pool.running)
        assert time.monotonic() - left < 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_leaving_while_queued(self, edge: EdgeServer, stream: bool, eventually: Callable[..., None]) -> None:
        edge.pool.open_seconds = 30
        connection = edge.connect(post_bytes(chat(stream=stream)))
        eventually(lambda: edge.pool.opening)
        connection.close()
        eventually(lambda: not edge.pool.opening)
        assert not edge.pool.running

    def test_leaving_before_the_body_is_whole(self, edge: EdgeServer, eventually: Callable[..., None]) -> None:
        connection = edge.connect(post_bytes(chat())[:-5])
        eventually(lambda: edge.connections == 1)
        connection.close()
        eventually(lambda: edge.connections == 0)
        assert not edge.pool.requests
        assert edge.post(CHAT, chat())[0] == 200

    def test_a_client_that_does_not_read_is_dropped(
        self, edge: EdgeServer, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
    ) -> None:
        monkeypatch.setattr(limits, "STALL_SECONDS", 0.3)
        monkeypatch.setattr(limits, "WATCH_SECONDS", 0.05)
        edge.pool.words, edge.pool.pause = ["x" * 100_000] * 10_000, 0.001
        with edge.connect(post_bytes(chat(stream=True))):
            eventually(lambda: edge.pool.running)
            eventually(lambda: not edge.pool.running)
            eventually(lambda: edge.connections == 0)

    def test_a_slow_reader_gets_everything(self, edge: EdgeServer) -> None:
        edge.pool.words = [f"{number:06d}" + "x" * 5_000 for number in range(1_000)]
        with edge.connect(post_bytes(chat(stream=True), "Connection: close\r\n")) as connection:
            data = b""
            while chunk := connection.recv(200_000):
                data += chunk
                time.sleep(0.001)
        assert re.findall(rb"(\d{6})x", data) == [b"%06d" % number for number in range(1_000)]
        assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    def test_an_idle_stream_is_kept_awake(self, edge: EdgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "HEARTBEAT_SECONDS", 0.1)
        monkeypatch.setattr(limits, "WATCH_SECONDS", 0.02)
        edge.pool.words, edge.pool.pause = ["late"], 0.5
        _, _, body = edge.post(CHAT, chat(stream=True))
        comments = [event for event in body.split(b"\n\n") if event.startswith(b":")]
        assert 2 <= len(comments) <= 5
        assert b'"content":"late"' in body
