"""One running request: its sequences' pieces on the way to whoever reads them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

import msgspec

from app.messages import Piece, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from app.errors import PestleError


class Update(msgspec.Struct, frozen=True):
    """What there is new of one choice; its piece may be several of the worker's, merged."""

    index: int
    piece: Piece


class Owner(Protocol):
    """What a generation needs of the pool that opened it."""

    def finished(self, generation: Generation) -> None:
        """Give the permits back and cancel what still runs; called exactly once."""


class Generation:
    """The stream of one request over all its choices. It holds the request's permits until it ends.

    Iterate to get lists of updates as they come, or `collect()` to get each choice whole; then `aclose()`, always.
    """

    def __init__(self, owner: Owner, prompts: int, n: int) -> None:
        self.prompt_tokens = 0  # over all prompts, each counted once
        self.completion_tokens = 0  # drawn so far, over all choices
        self.error: PestleError | None = None
        self.delivered = False  # the reader has had something: nothing may be run again silently
        self.prompt_end = ""  # the last of a chat's text, from which the answer goes on
        self.has_certain_calls = False  # a grammar holds calls of tools to their form
        self._opened = time.monotonic()
        self._first_token = 0.0
        self._queued = 0.0
        self._finish_reasons: set[str] = set()
        self.echoes: list[str] = []  # the prompts' texts, if they were asked for
        self._owner = owner
        self._buffers = [_ChoiceBuffer() for _ in range(prompts * n)]
        self._cached = [0] * prompts
        self._n = n
        self._unfinished = prompts * n
        self._unaccepted = prompts * n
        self._waiter: asyncio.Future[None] | None = None
        self._shortcut: Callable[[], bool] | None = None
        self._closed = False

    def push(self, index: int, piece: Piece) -> None:
        """Take one piece of a choice from the worker; the reader is woken."""
        buffer = self._buffers[index]
        if buffer.completion_tokens == 0 and index % self._n == 0:
            self._cached[index // self._n] = piece.cached_tokens  # of the others it says what the first computed
        self.completion_tokens += piece.completion_tokens - buffer.completion_tokens
        if not self._first_token and piece.completion_tokens:
            self._first_token = time.monotonic()
        buffer.add(piece)
        if piece.finish_reason is not None:
            self._unfinished -= 1
            self._finish_reasons.add(piece.finish_reason)
            if piece.timings is not None:
                self._queued = max(self._queued, piece.timings.queued)
        if not (self._unfinished and self._waiter is not None and self._shortcut is not None and self._shortcut()):
            self._wake()

    def accept(self) -> None:
        """Take notice that the worker has one more of the choices in its queue."""
        self._unaccepted -= 1
        self._wake()

    async def accepted(self) -> None:
        """Wait until the worker has all choices in its queue. Raises what `fail` was told."""
        while self._unaccepted:
            if self.error is not None:
                raise self.error
            await self._arrival()

    def restart(self, index: int) -> None:
        """Forget what an unfinished choice gave so far: a fresh worker begins it anew."""
        buffer = self._buffers[index]
        self.completion_tokens -= buffer.completion_tokens
        self._buffers[index] = _ChoiceBuffer()

    def fail(self, error: PestleError) -> bool:
        """End the stream with this error, after the pieces that are already here; returns whether it does.

        The first error stays, and what is complete stays complete.
        """
        if self.error is not None or not self._unfinished:
            return False
        self.error = error
        self._wake()
        return True

    def listen(self, shortcut: Callable[[], bool]) -> None:
        """Have `shortcut` called for a piece, if the reader waits for one, before the reader is woken.

        It returns whether it took what there is: then the reader sleeps on, which saves a turn of the event loop for
        each token. The last pieces and errors are the reader's.
        """
        self._shortcut = shortcut

    async def __aiter__(self) -> AsyncIterator[list[Update]]:
        """Yield everything there is now, merged by choice, until every choice is finished.

        Raises EngineCrashedError, EngineError or DrainingError in mid-stream.
        """
        while True:
            if updates := self.take():
                yield updates
            elif self.error is not None:
                raise self.error
            elif self._unfinished == 0 or self._closed:
                return
            else:
                await self._arrival()

    async def collect(self) -> list[Piece]:
        """Return each choice as one piece, whole, by index. For answers that don't stream.

        Until this returns nothing counts as delivered, so that a worker's death is cured by running it again.
        Raises the same errors as iterating.
        """
        while self._unfinished:
            if self.error is not None:
                raise self.error
            if self._closed:
                raise asyncio.CancelledError
            await self._arrival()
        return [update.piece for update in self.take()]

    async def aclose(self) -> None:
        """Cancel what still runs and give the permits back; may be called again."""
        self.close()

    def close(self) -> None:
        """Do what `aclose` does; nothing of it waits."""
        if not self._closed:
            self._closed = True
            self._owner.finished(self)
            self._wake()

    def summary(self) -> dict[str, object]:
        """Return what a log may say of it: tokens, seconds, how it ended; nothing of what was asked or answered.

        The time to the first token counts from the admission; the longest wait of a choice for its slot is the queue's.
        """
        reasons = self._finish_reasons | ({"cancelled"} if self._unfinished and self.error is None else set())
        found: dict[str, object] = {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reason": ",".join(sorted(reasons)) or None,
        }
        if self._finish_reasons:
            found["queue_seconds"] = round(self._queued, 4)
        if self._first_token:
            found["ttft_seconds"] = round(self._first_token - self._opened, 4)
        return found

    @property
    def cached_tokens(self) -> int:
        """Of `prompt_tokens`, those that were already in the KV cache."""
        return sum(self._cached)

    @property
    def closed(self) -> bool:
        """Whether the permits are back."""
        return self._closed

    def take(self) -> list[Update]:
        """Return everything there is now, merged by choice; from then on it counts as delivered."""
        updates = [
            Update(index, buffer.take()) for index, buffer in enumerate(self._buffers) if buffer.last is not None
        ]
        self.delivered = self.delivered or bool(updates)
        return updates

    async def _arrival(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _ChoiceBuffer:
    """Pieces of one choice that nobody has read yet."""

    __slots__ = ("_logprobs", "_prompt_logprobs", "_texts", "completion_tokens", "last")

    def __init__(self) -> None:
        self.completion_tokens = 0
        self.last: Piece | None = None  # the newest unread piece
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._prompt_logprobs: list[TokenLogprob] | None = None

    def add(self, piece: Piece) -> None:
        """Keep a piece behind those that are unread."""
        self.completion_tokens = piece.completion_tokens
        self._texts.append(piece.text)
        if piece.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = []
            self._logprobs.extend(piece.logprobs)
        if piece.prompt_logprobs is not None:
            if self._prompt_logprobs is None:
                self._prompt_logprobs = []
            self._prompt_logprobs.extend(piece.prompt_logprobs)
        self.last = piece

    def take(self) -> Piece:
        """Return the unread pieces as one; a lone piece is passed on untouched."""
        last, texts, logprobs, of_prompt = self.last, self._texts, self._logprobs, self._prompt_logprobs
        assert last is not None  # noqa: S101 - the caller looked
        self.last, self._texts, self._logprobs, self._prompt_logprobs = None, [], None, None
        if len(texts) == 1:
            return last
        return msgspec.structs.replace(last, text="".join(texts), logprobs=logprobs, prompt_logprobs=of_prompt)
