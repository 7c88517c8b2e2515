"""Prompts that come back before their answers, and the best of several answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from app.server.schema.responses import TextLogprobs

if TYPE_CHECKING:
    from app.messages import Piece, TokenLogprob


class EchoedChoice:
    """One choice whose text begins with its prompt, as do its log probabilities if there are any."""

    def __init__(self, prompt: str, logprobs: TextLogprobs) -> None:
        self._prompt = prompt
        self._logprobs = logprobs
        self._entries: list[TokenLogprob] = []
        self._opened = False

    def take(self, piece: Piece) -> Piece | None:
        """Return a piece with what belongs before it; None while the prompt is not complete."""
        if self._opened:
            return piece
        self._entries += piece.prompt_logprobs or ()
        if not piece.completion_tokens and piece.finish_reason is None:
            return None
        self._opened = True
        logprobs = piece.logprobs
        if self._entries:
            self._logprobs.begin_at(-self._lead())
            logprobs = [*self._entries, *(piece.logprobs or ())]
            self._entries = []
        return msgspec.structs.replace(piece, text=self._prompt + piece.text, logprobs=logprobs, prompt_logprobs=None)

    def _lead(self) -> int:
        """Return how many characters the tokens have before the prompt's text: of BOS, or of a vocabulary's space."""
        joined = b"".join(entry.text for entry in self._entries).decode("utf-8", "replace")
        return len(joined) - len(self._prompt) if joined.endswith(self._prompt) else 0


def best(pieces: list[Piece], candidates: int, n: int) -> list[Piece]:
    """Return of each prompt's `candidates` the `n` whose tokens are the most probable on average, best first."""
    chosen: list[Piece] = []
    for start in range(0, len(pieces), candidates):
        chosen += sorted(pieces[start : start + candidates], key=_mean_logprob, reverse=True)[:n]
    return chosen


def _mean_logprob(piece: Piece) -> float:
    logprobs = [entry.logprob for entry in piece.logprobs or ()]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0
