"""Models without a form of their own: `{"tool_calls": [{"name": ..., "arguments": {...}}, ...]}` is all of the answer.

What models make of that is read, too: the array or a call alone, and a fence around it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from app.chat.marked import MarkedCalls
from app.chat.readers import JsonCalls, State

if TYPE_CHECKING:
    from app.chat.events import Event, Parser
    from app.chat.readers import Schemas

MARKS: tuple[str, ...] = ()
_FENCES = ("```json", "```")
_WRAPPER = re.compile(r'\s*+\{\s*+"tool_calls"\s*+:\s*+(?=\[)')
_WRAPPER_SO_FAR = re.compile(r'\s*+(\{\s*+("(t(o(o(l(_(c(a(l(l(s("\s*+(:\s*+)?)?)?)?)?)?)?)?)?)?)?)?)?)?')


class _Calls:
    """Reads calls with or without the wrapper."""

    def __init__(self, schemas: Schemas, *, certain: bool) -> None:
        self.state = State.MORE
        self.rest = ""
        self._calls = JsonCalls(schemas, certain=certain, several=True)
        self._wrapper = ""
        self._is_open = False  # whether the wrapper's `}` is still to come
        self._has_begun = False

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""
        if self._has_begun and self._calls.state is State.DONE:
            self.rest += text
            self._close_wrapper()
            return []
        if not self._has_begun:
            self.rest += text
            if not self._begin():
                return []
            text, self.rest = self.rest, ""
        events = self._calls.feed(text)
        self.rest = self._calls.rest if events or self._calls.state is State.DONE else self._wrapper + self._calls.rest
        self._wrapper = "" if events else self._wrapper
        self.state = State.MORE if self._calls.state is State.DONE else self._calls.state
        if self._calls.state is State.DONE:
            self._close_wrapper()
        return events

    def close(self) -> list[Event]:
        """End."""
        if self._has_begun and self._calls.state is State.MORE:
            events = self._calls.close()
            self.rest = self._wrapper + self._calls.rest if self._calls.rest else ""
            return events
        if self._has_begun and not self.rest.strip():
            self.rest = ""
        return []

    def _begin(self) -> bool:
        wrapper = _WRAPPER.match(self.rest)
        if wrapper is None:
            self._has_begun = not _WRAPPER_SO_FAR.fullmatch(self.rest)
        else:
            self._has_begun = self._is_open = True
            self._wrapper, self.rest = wrapper[0], self.rest[wrapper.end() :]
        return self._has_begun

    def _close_wrapper(self) -> None:
        text = self.rest.lstrip()
        if self._is_open and not text:
            return
        if self._is_open and text.startswith("}"):
            self.rest = text[1:]
        self.state = State.DONE


def parser(schemas: Schemas, *, certain: bool) -> Parser:
    """Return a parser of one answer."""
    return MarkedCalls(lambda: _Calls(schemas, certain=certain), ends=_FENCES[1:], leading=("{", "[", *_FENCES))
