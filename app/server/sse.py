"""Server-sent events: an answer's chunks as bytes, and the response that sends them and watches the client.

What the chunks of one choice have in common is encoded once; for each piece only its text is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from litestar.response import Stream
from litestar.response.streaming import ASGIStreamingResponse

from app.pool.generation import Update
from app.server import limits
from app.server.exchange import exchange_of
from app.server.schema.echo import EchoedChoice
from app.server.schema.responses import TextLogprobs, chat_logprobs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

    from litestar.connection import Request
    from litestar.response.base import ASGIResponse
    from litestar.types import Receive, Scope, Send

    from app.messages import Piece
    from app.pool.generation import Generation
    from app.server.exchange import Exchange
    from app.server.schema.responses import Identity

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still working\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
MEDIA_TYPE = "text/event-stream"

_encode = msgspec.json.encode


def event(document: dict[str, Any]) -> bytes:
    """Return one event with this JSON document."""
    return b"data: " + _encode(document) + b"\n\n"


class Chunks:
    """The events of one answer. What the events of a choice have in common is encoded once."""

    kind: ClassVar[str]

    def __init__(self, identity: Identity, choices: int, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        fields = {"id": identity.id, "object": self.kind, **msgspec.structs.asdict(identity)}
        head = b"data: " + _encode(fields)[:-1] + b',"choices":['
        self._head = head
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._starts = [head + b'{"index":%d,' % index for index in range(choices)]

    def opened(self, generation: Generation) -> None:
        """Take notice of the generation whose events these will be, before the first of them."""

    def encode(self, updates: Iterable[Update]) -> bytes:
        """Return the events of everything there is now, to be sent at once; perhaps none."""
        events = []
        for update in updates:
            piece = update.piece
            if piece.text or piece.logprobs:
                events.append(self.text(update.index, piece))
            if piece.finish_reason is not None:
                events.append(self.last(update.index, piece.finish_reason))
        return b"".join(events)

    def end(self, usage: dict[str, Any]) -> bytes:
        """Return what ends the stream: the one event without choices, if it was asked for, and the mark."""
        return b'%s],"usage":%s}\n\n%s' % (self._head, _encode(usage), DONE) if self._include_usage else DONE

    def first(self) -> bytes:
        """Return the events that open every choice, if any do."""
        raise NotImplementedError

    def text(self, index: int, piece: Piece) -> bytes:
        """Return the event that carries a piece's text and log probabilities."""
        raise NotImplementedError

    def last(self, index: int, finish_reason: str) -> bytes:
        """Return the event that ends a choice."""
        raise NotImplementedError


class ChatChunks(Chunks):
    """The events of one chat answer."""

    kind = "chat.completion.chunk"

    def __init__(self, identity: Identity, choices: int, *, include_usage: bool) -> None:
        super().__init__(identity, choices, include_usage=include_usage)
        self._text_starts = [start + b'"delta":{"content":' for start in self._starts]
        self._text_end = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def first(self) -> bytes:
        """Return one event a choice, with the role and no text."""
        opening = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' + self._tail
        return b"".join(start + opening for start in self._starts)

    def text(self, index: int, piece: Piece) -> bytes:
        """Return the event that carries a piece's text and log probabilities."""
        start, text = self._text_starts[index], _encode(piece.text)
        if piece.logprobs is None:
            return start + text + self._text_end
        logprobs = _encode(chat_logprobs(piece.logprobs))
        return b'%s%s},"logprobs":%s,"finish_reason":null}%s' % (start, text, logprobs, self._tail)

    def last(self, index: int, finish_reason: str) -> bytes:
        """Return the event that ends a choice."""
        reason = _encode(finish_reason)
        return b'%s"delta":{},"logprobs":null,"finish_reason":%s}%s' % (self._starts[index], reason, self._tail)


class TextChunks(Chunks):
    """The events of one text answer; `top`: whether alternative tokens were asked for."""

    kind = "text_completion"

    def __init__(self, identity: Identity, choices: int, *, include_usage: bool, top: bool) -> None:
        super().__init__(identity, choices, include_usage=include_usage)
        self._text_starts = [start + b'"text":' for start in self._starts]
        self._text_end = b',"logprobs":null,"finish_reason":null}' + self._tail
        self._logprobs = [TextLogprobs(top=top) for _ in range(choices)]

    def first(self) -> bytes:
        """Return nothing: text answers have no opening event."""
        return b""

    def text(self, index: int, piece: Piece) -> bytes:
        """Return the event that carries a piece's text and log probabilities."""
        start, text = self._text_starts[index], _encode(piece.text)
        if piece.logprobs is None:
            return start + text + self._text_end
        logprobs = _encode(self._logprobs[index].take(piece.logprobs))
        return b'%s%s,"logprobs":%s,"finish_reason":null}%s' % (start, text, logprobs, self._tail)

    def last(self, index: int, finish_reason: str) -> bytes:
        """Return the event that ends a choice."""
        reason = _encode(finish_reason)
        return b'%s"","logprobs":null,"finish_reason":%s}%s' % (self._text_starts[index], reason, self._tail)


class EchoChunks(TextChunks):
    """The events of a text answer that begins with its prompt."""

    def opened(self, generation: Generation) -> None:
        """Take the prompts' texts."""
        n = len(self._starts) // len(generation.echoes)
        self._echoed = [
            EchoedChoice(generation.echoes[index // n], logprobs) for index, logprobs in enumerate(self._logprobs)
        ]

    def encode(self, updates: Iterable[Update]) -> bytes:
        """Return the events of everything there is now; none of a choice whose prompt is not complete."""
        pieces = ((update.index, self._echoed[update.index].take(update.piece)) for update in updates)
        return super().encode(Update(index, piece) for index, piece in pieces if piece is not None)


class EventStream(Stream):
    """A response of encoded events whose generator is closed when the client goes, or stops reading."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: dict[str, str], release: Callable[[], Awaitable[None]]
    ) -> None:
        """Take the events and what to call at the end, also when they were never begun."""
        super().__init__(events, headers=HEADERS | headers, media_type=MEDIA_TYPE)
        self._events = events
        self._release = release

    def to_asgi_response(
        self,
        app: Any,  # noqa: ARG002 - Litestar's signature
        request: Request[Any, Any, Any],
        **options: Any,  # noqa: ARG002 - what outer layers would add; there are none
    ) -> ASGIResponse:
        """Return the response that Litestar calls."""
        return _WatchedStream(self._events, self.headers, self._release, exchange_of(request.scope))


class _WatchedStream(ASGIStreamingResponse):
    """Sends events straight to the server's `send`, past the framework's wrappers, and watches the client meanwhile."""

    __slots__ = ("_events", "_exchange", "_release", "_sending")

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: dict[str, str],
        release: Callable[[], Awaitable[None]],
        exchange: Exchange,
    ) -> None:
        super().__init__(iterator=events, headers=headers, media_type=MEDIA_TYPE)
        self._events = events
        self._release = release
        self._exchange = exchange
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; whatever happens, the generator is closed and its source released."""
        try:
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            await self._release()

    async def send_body(self, send: Send, receive: Receive) -> None:  # noqa: ARG002 - the server's own is faster
        """Send all events; ends early when the client is gone or takes nothing."""
        self._exchange.sent = time.monotonic()
        sender = asyncio.create_task(self._send_events())
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not sender.done():
                self._exchange.error_code = "client_gone"
        finally:
            watcher.cancel()
            sender.cancel()
            results = await asyncio.gather(sender, watcher, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _send_events(self) -> None:
        async for chunk in self._events:
            self._sending = True
            await self._exchange.send_part(chunk)
            self._sending = False
        await self._exchange.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, receive: Receive) -> None:
        """Return when the client is gone; drop one that reads nothing, keep an idle connection awake."""
        while True:
            try:
                async with asyncio.timeout(limits.WATCH_SECONDS):
                    if (await receive())["type"] == "http.disconnect":
                        return
            except TimeoutError:
                idle = time.monotonic() - self._exchange.sent
                if self._sending:
                    if idle >= limits.STALL_SECONDS:
                        self._exchange.abort()
                elif idle >= limits.HEARTBEAT_SECONDS and not await self._beat() and idle >= limits.STALL_SECONDS:
                    self._exchange.abort()

    async def _beat(self) -> bool:
        """Send a comment; returns whether it went out."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.WATCH_SECONDS):
                await self._exchange.send_part(HEARTBEAT)
                return True
        return False
