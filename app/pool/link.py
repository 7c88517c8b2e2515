"""The API process's end of a child's socket: frames in, frames out.

Every engine step brings a frame, so what happens per frame is one slice, one typed decode and one call.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import msgspec

from app.messages import FrameReader, encode_frame
from app.observability.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

log = get_logger(__name__)


class Link(asyncio.Protocol):
    """Decodes each frame to the type that `decoder` knows and hands it to `on_message`.

    `closed` completes when the child's end is gone, also after a frame that is none.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any], on_message: Callable[[Any], None]) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._decode = decoder.decode
        self._on_message = on_message
        self._feed = FrameReader().feed
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one without being a subclass

    def data_received(self, data: bytes) -> None:
        """Dispatch the frames that are complete."""
        try:
            for body in self._feed(data):
                self._on_message(self._decode(body))
        except (ValueError, msgspec.DecodeError):
            log.exception("a child does not speak frames; its link is cut")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the cause is in the exit status
        """Complete `closed`."""
        self._transport = None
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, message: msgspec.Struct) -> None:
        """Write one frame; to a child that has gone it goes nowhere."""
        if self._transport is not None:
            self._transport.write(encode_frame(message))

    def abort(self) -> None:
        """Close the socket at once; the child leaves when it sees that."""
        if self._transport is not None:
            self._transport.abort()
