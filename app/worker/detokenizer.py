"""From token bytes to whole text: partial UTF-8 and possible stop strings are held back until they are decided."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """One sequence's text. The pieces that it returns join to the same text however the bytes were split."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """Cut the text before whichever of the `stop` strings is complete first; empty ones are ignored."""
        self._decoder = _new_decoder("replace")
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.stopped = False  # a stop string has come; everything after it is dropped

    def push(self, data: bytes) -> str:
        """Take the next token's bytes; return the text that is decided now."""
        return self._pass_on(self._decoder.decode(data))

    def flush(self) -> str:
        """End: return what was held back. Bytes that never became a character become U+FFFD."""
        text = self._pass_on(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _pass_on(self, text: str) -> str:
        if not self._stop:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        ends = [(found + len(stop), found) for stop in self._stop if (found := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of the text that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
