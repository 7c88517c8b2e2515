"""What parsers make of an answer's text, in the order in which it was written."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Text(NamedTuple):
    """More of the answer's content."""

    text: str


class Reasoning(NamedTuple):
    """More of what the model thinks before it answers."""

    text: str


class CallBegin(NamedTuple):
    """A call begins; the arguments that follow are its own."""

    name: str


class CallArguments(NamedTuple):
    """More of the JSON of the current call's arguments."""

    text: str


Event = Text | Reasoning | CallBegin | CallArguments


class Parser(Protocol):
    """Reads text in pieces. The events join to the same whatever the pieces are."""

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""

    def close(self) -> list[Event]:
        """End; return what was held back."""


def joined(events: list[Event]) -> list[Event]:
    """Return the events with neighbours of one kind put together, and without empty ones."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, CallBegin):
            found.append(event)
        elif event.text:
            if last is not None and type(last) is type(event) and not isinstance(last, CallBegin):
                found[-1] = type(event)(last.text + event.text)
            else:
                found.append(event)
    return found


def undecided(text: str, marks: tuple[str, ...]) -> int:
    """Return the length of the longest end of the text that one of the marks begins with, but is not."""
    longest = min(len(text), max((len(mark) for mark in marks), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(len(mark) > length and mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
