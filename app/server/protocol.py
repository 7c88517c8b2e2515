"""uvicorn's HTTP protocol with the deadlines and limits that it lacks, and refusals in OpenAI's shape."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.server.exchange import choose_request_id
from app.server.limits import BODY_SECONDS, HEADER_SECONDS, KEEP_ALIVE_SECONDS, MAX_HEADER_BYTES, MAX_SOCKETS

_TOO_LARGE = (431, b"Request Header Fields Too Large", f"the headers are over {MAX_HEADER_BYTES} bytes: send less")
_TOO_SLOW = (408, b"Request Timeout", f"the headers did not arrive within {HEADER_SECONDS:g} s")
_MALFORMED = (400, b"Bad Request", "this is not valid HTTP/1.1")


_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class BoundedHttpProtocol(HttpToolsProtocol):
    """A connection whose headers must come whole within 10 s and 16 KiB, and whose unread body is not read for ever."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._header_bytes = 0  # of complete lines
        self._unfinished_bytes = 0  # that came without completing the headers
        self._in_headers = True
        self._awaits_headers = True  # also between two requests
        self._refused = False
        self._lingers = False  # the answer is complete and its end sent; closed when the body is
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a connection that says nothing is closed, one too many at once."""
        super().connection_made(transport)
        self._set_deadline(HEADER_SECONDS)
        if len(self.connections) > MAX_SOCKETS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._set_deadline(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; headers that never end are cut off even when no line of them is complete."""
        if self._refused:
            return
        was_in_headers = self._in_headers
        super().data_received(_without_upgrade(data) if self._awaits_headers else data)
        if was_in_headers and self._in_headers and not self._refused:
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > MAX_HEADER_BYTES:
                self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Start the clock of the next request's headers."""
        super().on_message_begin()
        self._in_headers = True
        self._header_bytes = self._unfinished_bytes = 0
        self._set_deadline(HEADER_SECONDS)

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count one header."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request on, with the means to cut its connection."""
        self._in_headers = self._awaits_headers = False
        self._set_deadline(None)
        self.scope["state"]["abort"] = self.transport.abort
        self.scope["state"]["is_paused"] = self._is_paused
        super().on_headers_complete()
        self.cycle.transport = _Outlet(self.transport, self._close_after_body)

    def on_response_complete(self) -> None:
        """Give a body that is still coming, and that nobody reads, the time a body has."""
        if self.cycle.more_body:
            self._set_deadline(BODY_SECONDS)
        super().on_response_complete()

    def on_message_complete(self) -> None:
        """Stop the clock of an unread body; wait for the next request as long as connections are kept."""
        self._awaits_headers = True
        self._set_deadline(KEEP_ALIVE_SECONDS if self.cycle.response_complete else None)
        super().on_message_complete()
        if self._lingers:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Refuse what could not be parsed."""
        if not self._refused:
            self._refuse(_TOO_LARGE if self._header_bytes > MAX_HEADER_BYTES else _MALFORMED)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ValueError("the headers are too large")  # the parser stops, and send_400_response is called

    def _set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._on_deadline)

    def _is_paused(self) -> bool:
        return self.flow.write_paused

    def _close_after_body(self) -> None:
        """Close, but not on a client that is still sending: the reset would take the answer from it."""
        if self.cycle.more_body and not self.transport.is_closing():
            self._lingers = True
            self.transport.write_eof()
        else:
            self.transport.close()

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._in_headers and self._header_bytes:
            self._refuse(_TOO_SLOW)
        else:
            self.transport.close()

    def _refuse(self, refusal: tuple[int, bytes, str]) -> None:
        """Answer and close; a response that is already under way is cut instead."""
        self._refused = True
        status, reason, message = refusal
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not begun and not self.pipeline:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": "bad_http"}
            body = msgspec.json.encode({"error": error})
            head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n" % (status, reason)
            head += b"x-request-id: %s\r\n" % choose_request_id([]).encode()
            self.transport.write(head + b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(body), body))
        self.transport.close()


class _Outlet(asyncio.Transport):
    """The transport as a request's cycle uses it, which closes in our way."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        super().__init__()
        self.write = transport.write  # type: ignore[method-assign]
        self.is_closing = transport.is_closing  # type: ignore[method-assign]
        self.close = close  # type: ignore[method-assign]


def _without_upgrade(data: bytes) -> bytes:
    """Return the data with offers to upgrade renamed: we decline them, and the parser would drop the body behind one.

    Java's HTTP client offers h2c with every request.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-declined-upgrade:", head) + end + rest if _UPGRADE.search(head) else data
