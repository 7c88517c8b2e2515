"""What one client may take: bytes, seconds, connections. And how a body is read within them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from app.errors import BodyTimeoutError, BodyTooLargeError, ContentTypeError, RequestError
from app.server.disconnect import ClientGoneError

if TYPE_CHECKING:
    from litestar.connection import Request

MAX_BODY_BYTES = 2 * 1024 * 1024
BODY_SECONDS = 30.0
MAX_HEADER_BYTES = 16 * 1024
HEADER_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 75
MAX_CONNECTIONS = 256  # above it all but probes get a 429
MAX_SOCKETS = 512  # above it connections are cut unheard: descriptors are needed for new children, too
HEARTBEAT_SECONDS = 15.0  # without data in a stream, then a comment
STALL_SECONDS = 30.0  # without progress towards a client that doesn't read, then it is dropped
WATCH_SECONDS = 5.0  # how often both are looked at


async def read_json_body(request: Request[Any, Any, Any]) -> bytes:
    """Return the whole body.

    Raises ContentTypeError unless it is JSON or says nothing, BodyTooLargeError as soon as that is known,
    BodyTimeoutError when it does not arrive in time, RequestError for a Content-Length that is no number.
    """
    content_type = request.headers.get("content-type", "application/json")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ContentTypeError(
            f"the content type is {media_type[:100]!r}: send JSON with 'Content-Type: application/json'"
        )
    announced = request.headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdigit()):
        raise RequestError("Content-Length is not a number")
    if len(announced) > 12 or int(announced) > MAX_BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _receive(request)
    except TimeoutError:
        raise BodyTimeoutError(
            f"the body did not arrive within {BODY_SECONDS:g} s: send it faster, or send less"
        ) from None


async def _receive(request: Request[Any, Any, Any]) -> bytes:
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        body += message["body"]
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return bytes(body)


def _too_large() -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is over {MAX_BODY_BYTES} bytes (2 MiB): send less")
