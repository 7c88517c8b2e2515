"""Calls that stand between marks, or at an answer's beginning; everything else is content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.chat.events import CallBegin, Event, Text, joined, undecided
from app.chat.readers import Reader, State

if TYPE_CHECKING:
    from collections.abc import Callable


class MarkedCalls:
    """Finds the blocks of calls in an answer. White space around them is dropped."""

    def __init__(
        self,
        reader: Callable[[], Reader],
        begins: tuple[str, ...] = (),
        ends: tuple[str, ...] = (),
        leading: tuple[str, ...] = (),
    ) -> None:
        """Read a block with a new reader after each of `begins`, and drop the one of `ends` that follows it.

        A text of `leading` begins a block as well when it is the first of the answer, and belongs to the block if it is
        a bracket.
        """
        self._new_reader = reader
        self._begins, self._ends, self._leading = begins, ends, leading
        self._text = ""
        self._mark = ""  # of the block that is being read, with the white space before it
        self._reader: Reader | None = None
        self._at_start = bool(leading)
        self._awaits_end = False
        self._has_calls = False

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""
        self._text += text
        events: list[Event] = []
        while self._step(events):
            pass
        return joined(events)

    def close(self) -> list[Event]:
        """End; return what was held back."""
        if self._reader is None:
            ending = self._awaits_end and any(end.startswith(self._text.strip()) for end in self._ends)
            is_kept = not ending and not (self._has_calls and not self._text.strip())
            return joined([Text(self._text)]) if is_kept else []
        events = self._reader.close()
        if self._reader.rest:
            events.append(Text(self._mark + self._reader.rest))
        return joined(events)

    def _step(self, events: list[Event]) -> bool:
        """Go on; return whether there is more to do with what is there."""
        if self._reader is not None:
            return self._read(events, self._reader)
        if self._awaits_end:
            return self._take_end()
        if self._at_start:
            return self._take_leading()
        found = [(place, mark) for mark in self._begins if (place := self._text.find(mark)) >= 0]
        if found:
            place, mark = min(found)
            before = self._text[:place].rstrip()
            events.append(Text(before))
            self._open(self._text[len(before) : place] + mark, self._text[place + len(mark) :])
            return True
        known = len(self._text) - undecided(self._text, self._begins)
        known = len(self._text[:known].rstrip())
        events.append(Text(self._text[:known]))
        self._text = self._text[known:]
        return False

    def _open(self, mark: str, text: str) -> None:
        self._mark, self._text, self._reader = mark, text, self._new_reader()

    def _read(self, events: list[Event], reader: Reader) -> bool:
        found = reader.feed(self._text)
        self._text = ""
        events += found
        if any(isinstance(event, CallBegin) for event in found):
            self._has_calls, self._mark = True, ""
        if reader.state is State.MORE:
            return False
        self._reader = None
        self._text = reader.rest
        if reader.state is State.DONE:
            self._awaits_end = bool(self._ends)
        else:
            events.append(Text(self._mark))
        return True

    def _take_end(self) -> bool:
        text = self._text.lstrip()
        for end in self._ends:
            if text.startswith(end):
                self._text, self._awaits_end = text[len(end) :], False
                return True
        if any(end.startswith(text) for end in self._ends):
            return False
        self._awaits_end = False
        return True

    def _take_leading(self) -> bool:
        text = self._text.lstrip()
        space = self._text[: len(self._text) - len(text)]
        if any(lead.startswith(text) and lead != text for lead in self._leading):
            return False
        self._at_start = False
        for lead in self._leading:
            if text.startswith(lead):
                is_bracket = lead in "{["
                self._open(space if is_bracket else space + lead, text if is_bracket else text[len(lead) :])
                break
        return True
