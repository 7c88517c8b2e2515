"""llama-server's `timings`: how many tokens a second, in every chunk and in whole answers, for whoever asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from app.server.sse import Chunks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from app.messages import Piece
    from app.pool.generation import Generation, Update

_END = b"}\n\n"


def timings(pieces: list[Piece], generation: Generation) -> dict[str, Any]:
    """Return the times of some choices of a request: all its prompts' tokens, the choices' own, the longest times."""
    cached = generation.cached_tokens
    prefill = max((piece.timings.prefill for piece in pieces if piece.timings), default=0.0)
    decode = max((piece.timings.decode for piece in pieces if piece.timings), default=0.0)
    predicted = sum(piece.completion_tokens for piece in pieces)
    return {
        "cache_n": cached,
        **_rates("prompt", generation.prompt_tokens - cached, prefill),
        **_rates("predicted", predicted, decode),
    }


def _rates(name: str, tokens: int, seconds: float) -> dict[str, Any]:
    return {
        f"{name}_n": tokens,
        f"{name}_ms": round(seconds * 1000, 3),
        f"{name}_per_token_ms": round(seconds * 1000 / tokens, 3) if tokens else 0.0,
        f"{name}_per_second": round(tokens / seconds, 3) if seconds > 0 else 0.0,
    }


class TimedChunks(Chunks):
    """Chunks of an answer, each event with the times of its choice."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._generation: Generation | None = None

    def opened(self, generation: Generation) -> None:
        """Take the generation whose tokens are counted."""
        self._generation = generation
        self._chunks.opened(generation)

    def first(self) -> bytes:
        """Return the events that open every choice."""
        return self._chunks.first()

    def encode(self, updates: Iterable[Update]) -> bytes:
        """Return the events of everything there is now."""
        events = []
        for update in updates:
            encoded = self._chunks.encode([update])
            if update.piece.timings is not None and self._generation is not None:
                tail = b',"timings":' + msgspec.json.encode(timings([update.piece], self._generation)) + _END
                encoded = b"".join(event + tail for event in encoded.split(_END)[:-1])
            events.append(encoded)
        return b"".join(events)

    def end(self, usage: dict[str, Any]) -> bytes:
        """Return what ends the stream."""
        return self._chunks.end(usage)
