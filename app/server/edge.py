"""The outermost layer: request ids, headers that every answer has, the limit of connections, the access log."""

from __future__ import annotations

import time
from logging import DEBUG, INFO
from typing import TYPE_CHECKING, Any

import msgspec

from app.errors import QueueFullError
from app.observability import logging
from app.server.exceptions import error_document, retry_headers
from app.server.exchange import REQUEST_ID_HEADER, Exchange, choose_request_id
from app.server.limits import MAX_CONNECTIONS
from app.server.unknown_fields import HEADER, header_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from litestar.types import ASGIApp, Message, Receive, Send

_PROBES = ("/livez", "/health")
_NO_SNIFF = (b"x-content-type-options", b"nosniff")

_log = logging.get_logger(__name__)


class Edge:
    """Wraps the application. A check of the Host header belongs here, before anything else is looked at."""

    def __init__(self, app: ASGIApp, *, warns_of_unknown_fields: bool = False) -> None:
        """Take the application; whoever serves it sets `connections` to what counts the open ones."""
        self._app = app
        self._warns_of_unknown_fields = warns_of_unknown_fields
        self.connections: Callable[[], int] = lambda: 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request; HEAD is answered as GET, of which the server then leaves out the body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        state: dict[str, Any] = scope.get("state") or {}
        request_id = choose_request_id(scope["headers"])
        exchange = Exchange(request_id, send, state.get("abort", lambda: None), state.get("is_paused", lambda: True))
        exchange.warns_of_unknown_fields = self._warns_of_unknown_fields
        added = [(REQUEST_ID_HEADER, request_id.encode("ascii")), _NO_SNIFF]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                unknown = exchange.unknown_fields
                more = [(HEADER, header_value(unknown))] if unknown else []
                message["headers"] = [*message["headers"], *added, *more]
            await send(message)

        inner: Any = {**scope, "state": {**state, "exchange": exchange}}
        if method == "HEAD":
            inner["method"] = "GET"
        token = logging.request_id.set(request_id)
        try:
            if self.connections() > MAX_CONNECTIONS and path not in _PROBES:
                await _refuse(send_with_headers)
            else:
                await self._app(inner, receive, send_with_headers)
        finally:
            _log_access(exchange, method, path)
            logging.request_id.reset(token)


async def _refuse(send: Send) -> None:
    error = QueueFullError(f"over {MAX_CONNECTIONS} connections are open: try again later, or use fewer")
    headers = {"content-type": "application/json", "connection": "close", **retry_headers(error)}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": msgspec.json.encode(error_document(error)), "more_body": False})


def _log_access(exchange: Exchange, method: str, path: str) -> None:
    fields: dict[str, Any] = {
        "method": method,
        "path": path[:200],
        "status": exchange.status,
        "seconds": round(time.monotonic() - exchange.started, 4),
    }
    if exchange.error_code is not None:
        fields["error_code"] = exchange.error_code
    fields |= exchange.fields
    level = DEBUG if path in _PROBES or path == "/metrics" else INFO
    _log.log(level, "request", extra=fields)
