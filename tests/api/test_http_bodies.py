"""Bodies: types, sizes, deadlines, errors; clients that leave or do not read."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest

from app.server import limits, protocol
from tests.api.wire import CHAT, chat, error_of, post_bytes, read_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import EdgeServer


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

    @pytest.mark.parametrize("connection", ["keep-alive", "close"])
    def test_a_client_still_sending_a_large_body_gets_the_answer(self, edge: EdgeServer, connection: str) -> None:
        for _ in range(3):  # the answer was lost to a reset most of the time
            status, _, answer = edge.send("POST", CHAT, b" " * 8_000_000, {"connection": connection})
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
