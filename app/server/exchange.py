"""One request and its answer, seen from the edge: its id, its status, its tokens."""

from __future__ import annotations

import re
import time
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from litestar.types import Send

REQUEST_ID_HEADER = b"x-request-id"
_ACCEPTABLE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Exchange:
    """What the layers of one request share; lives in the ASGI scope's state."""

    __slots__ = (
        "abort",
        "error_code",
        "fields",
        "is_paused",
        "request_id",
        "send",
        "sent",
        "started",
        "status",
        "unknown_fields",
        "warns_of_unknown_fields",
    )

    def __init__(
        self, request_id: str, send: Send, abort: Callable[[], None], is_paused: Callable[[], bool] = lambda: True
    ) -> None:
        self.request_id = request_id
        self.send = send  # the server's own, past all wrappers
        self.abort = abort  # ends the connection at once, unsent data and all
        self.is_paused = is_paused  # whether `send` would wait for the client to read
        self.sent = 0.0  # when a part of the body last went out, monotonic seconds
        self.started = time.monotonic()
        self.status = 0
        self.error_code: str | None = None
        self.fields: dict[str, object] = {}  # what the access log says of the answer; never a prompt
        self.warns_of_unknown_fields = False  # else they are refused
        self.unknown_fields: list[str] = []

    async def send_part(self, part: bytes) -> None:
        """Send a part of the body."""
        await self.send({"type": "http.response.body", "body": part, "more_body": True})
        self.sent = time.monotonic()

    def send_part_at_once(self, part: bytes) -> None:
        """Send a part of the body without a turn of the event loop; only while `is_paused` says no."""
        sending = self.send_part(part)
        try:
            sending.send(None)
        except StopIteration:
            return
        sending.close()
        raise RuntimeError("the server waits in sending although it is not paused")


def exchange_of(scope: MutableMapping[str, Any] | Any) -> Exchange:
    """Return the exchange that the edge put into this scope."""
    exchange: Exchange = scope["state"]["exchange"]
    return exchange


def choose_request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """Return the client's own id when it is short and plain, else a new one."""
    for name, value in headers:
        if name == REQUEST_ID_HEADER and _ACCEPTABLE_ID.fullmatch(value):
            return value.decode("ascii")
    return f"req_{uuid.uuid4().hex}"
