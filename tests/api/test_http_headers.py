"""Headers and HTTP itself: ids, limits, deadlines, upgrades."""

from __future__ import annotations

import http.client
import re
import time
from typing import TYPE_CHECKING

import pytest

from app.server import protocol
from tests.api.wire import CHAT, chat, error_of, post_bytes, read_all

if TYPE_CHECKING:
    from tests.api.conftest import EdgeServer


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

    @pytest.mark.parametrize("offer", ["h2c", "websocket"])
    @pytest.mark.parametrize("in_two", [False, True])
    def test_offers_to_upgrade_are_declined(self, edge: EdgeServer, offer: str, in_two: bool) -> None:
        data = post_bytes(chat(), f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {offer}\r\nHTTP2-Settings: AA\r\n")
        cut = data.index(b"\r\n\r\n") + 4 if in_two else len(data)
        with edge.connect(data[:cut]) as connection:
            time.sleep(0.02)
            connection.sendall(data[cut:])
            for request in (b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n", b""):
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                assert (answer.status, answer.read() != b"") == (200, True)
                connection.sendall(request)

    @pytest.mark.parametrize(
        "data",
        [
            b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\n\r\n",
            b"GET /livez HTTP/3.7\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nx-request-id: a\x01b\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"POST " + CHAT.encode() + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            b"POST " + CHAT.encode() + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ],
    )
    def test_bad_http(self, edge: EdgeServer, data: bytes) -> None:
        with edge.connect(data) as connection:
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"\r\nx-request-id: req_" in head
        error_of(body)
