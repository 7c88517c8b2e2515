"""Readers of what stands between the marks of calls. Each reads one block and then knows whether it was one.

A reader that is `certain` reads what a grammar has held to its form: it passes arguments on as they come. Else it waits
for a call's end, because what is no call after all is content.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from app.chat.brackets import Brackets
from app.chat.events import CallArguments, CallBegin, Event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Schemas = Mapping[str, dict[str, Any]]  # the tools that may be called: their parameters by their names

_NO_ARGUMENTS = "{}"
_ABSENT = msgspec.Raw(b"")
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_SEPARATORS = " \t\r\n,;"


class State(enum.Enum):
    """How far a reader is."""

    MORE = enum.auto()
    DONE = enum.auto()  # `rest` is what follows
    MALFORMED = enum.auto()  # `rest` is what is content, after the calls that were whole


class Reader(Protocol):
    """Reads one block of calls."""

    state: State
    rest: str

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""

    def close(self) -> list[Event]:
        """End; afterwards `rest` is what was no whole call."""


class Call(NamedTuple):
    """A whole call; the arguments are a JSON object as text."""

    name: str
    arguments: str


class _Object(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = _ABSENT
    parameters: msgspec.Raw = _ABSENT


def events_of(call: Call) -> list[Event]:
    """Return a whole call's events."""
    return [CallBegin(call.name), CallArguments(call.arguments)]


def json_call(text: str, schemas: Schemas) -> Call | None:
    """Return the call that this JSON object is; None when it is none, or none of a tool that may be called."""
    try:
        found = msgspec.json.decode(text.encode("utf-8", "replace"), type=_Object)
        raw = (bytes(found.arguments) or bytes(found.parameters)).decode()
        if raw.startswith('"'):  # arguments within a string, as OpenAI writes them
            raw = msgspec.json.decode(raw, type=str)
        if raw and not isinstance(msgspec.json.decode(raw), dict):
            return None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return Call(found.name, raw or _NO_ARGUMENTS) if found.name in schemas else None


class JsonCalls:
    """Calls as `{"name": ..., "arguments": {...}}`: one, an array of them, or, if `several`, one after the other."""

    def __init__(self, schemas: Schemas, *, certain: bool, several: bool = False) -> None:
        self.state = State.MORE
        self.rest = ""
        self._schemas = schemas
        self._certain = certain
        self._several = several
        self._array = False
        self._count = 0
        self._object: Brackets | None = None
        self._arguments: Brackets | None = None
        self._passed_on = 0  # of `rest`, when arguments are passed on as they come
        self._dropped = ""  # white space, brackets and separators since the last whole call

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""
        self.rest += text
        events: list[Event] = []
        while self.state is State.MORE and (self._within(events) if self._object else self._between()):
            pass
        if self.state is State.MALFORMED:
            self.rest = self._dropped + self.rest
        return events

    def close(self) -> list[Event]:
        """End; what is left of a call that has begun stays as it is."""
        is_rest = self._arguments is None and (not self._count or self.rest.strip(_SEPARATORS))
        self.rest = self._dropped + self.rest if is_rest else ""
        return []

    def _between(self) -> bool:
        """Find the next object; return whether there was something to take."""
        next_text = self.rest.lstrip(_SEPARATORS if self._count else None)
        if not next_text:
            return False
        skipped = len(self.rest) - len(next_text)
        if next_text[0] == "{" and (not self._count or self._array or self._several):
            self._dropped += self.rest[:skipped]
            self.rest, self._object = next_text, Brackets()
        elif next_text[0] == "[" and not self._array and not self._count:
            self._dropped += self.rest[: skipped + 1]
            self.rest, self._array = next_text[1:], True
        elif next_text[0] == "]" and self._array:
            self.rest, self.state = next_text[1:], State.DONE
        else:
            self.state = State.DONE if self._count and not self._array else State.MALFORMED
        return True

    def _within(self, events: list[Event]) -> bool:
        """Go on with an object; return whether it is whole."""
        if self._certain:
            self._pass_on(events)
        assert self._object is not None  # noqa: S101 - the caller looked
        end = self._object.end(self.rest)
        if end < 0:
            return False
        if self._arguments is None:
            call = json_call(self.rest[:end], self._schemas)
            if call is None:
                self.state = State.MALFORMED
                return True
            events += events_of(call)
        self.rest, self._dropped = self.rest[end:], ""
        self._object = self._arguments = None
        self._count += 1
        if not self._array and not self._several:
            self.state = State.DONE
        return True

    def _pass_on(self, events: list[Event]) -> None:
        if self._arguments is None:
            head = _HEAD.match(self.rest)
            if head is None or head[1] not in self._schemas:
                return
            events.append(CallBegin(head[1]))
            self._passed_on = head.end()
            self._arguments = Brackets(head.end())
        if self._passed_on >= 0:
            end = self._arguments.end(self.rest)
            events.append(CallArguments(self.rest[self._passed_on : None if end < 0 else end]))
            self._passed_on = len(self.rest) if end < 0 else -1


class NamedCall:
    """A call as a name, which `head` reads up to its first group's end, and a JSON object right behind it."""

    def __init__(self, schemas: Schemas, head: re.Pattern[str], head_so_far: re.Pattern[str], *, certain: bool) -> None:
        """Take the patterns of a whole head, behind which `{` stands, and of every beginning of one."""
        self.state = State.MORE
        self.rest = ""
        self._schemas = schemas
        self._head, self._head_so_far = head, head_so_far
        self._certain = certain
        self._name = ""
        self._start = self._passed_on = 0
        self._arguments: Brackets | None = None

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""
        self.rest += text
        events: list[Event] = []
        if self._arguments is None and not self._begin(events):
            return events
        assert self._arguments is not None  # noqa: S101 - it has begun
        end = self._arguments.end(self.rest)
        if self._certain:
            events.append(CallArguments(self.rest[self._passed_on : None if end < 0 else end]))
            self._passed_on = len(self.rest)
        if end >= 0:
            arguments = self.rest[self._start : end]
            if self._certain or is_object(arguments):
                events += [] if self._certain else events_of(Call(self._name, arguments))
                self.rest, self.state = self.rest[end:], State.DONE
            else:
                self.state = State.MALFORMED
        return events

    def close(self) -> list[Event]:
        """End; what is left of a call that has begun stays as it is."""
        if self._certain and self._arguments is not None:
            self.rest = ""
        return []

    def _begin(self, events: list[Event]) -> bool:
        head = self._head.match(self.rest)
        if head is None:
            if not self._head_so_far.fullmatch(self.rest):
                self.state = State.MALFORMED
            return False
        self._name = head[1]
        if self._name not in self._schemas:
            self.state = State.MALFORMED
            return False
        self._start = self._passed_on = head.end()
        self._arguments = Brackets(head.end())
        if self._certain:
            events.append(CallBegin(self._name))
        return True


class HeldCalls:
    """Calls that are read when their end has come, or the answer's, because their arguments are no JSON."""

    def __init__(self, ends: tuple[str, ...], read: Callable[[str], list[Call] | None]) -> None:
        """Read what comes before the first of `ends`; `read` returns None for what is no call."""
        self.state = State.MORE
        self.rest = ""
        self._ends = ends
        self._read = read
        self._searched = 0

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""
        self.rest += text
        found = [(place, end) for end in self._ends if (place := self.rest.find(end, self._searched)) >= 0]
        if not found:
            self._searched = max(0, len(self.rest) - max(map(len, self._ends)) + 1)
            return []
        place, end = min(found)
        calls = self._read(self.rest[:place])
        if calls is None:
            self.state = State.MALFORMED
            return []
        self.rest, self.state = self.rest[place + len(end) :], State.DONE
        return [event for call in calls for event in events_of(call)]

    def close(self) -> list[Event]:
        """End; calls without their end mark count when they are whole."""
        calls = self._read(self.rest)
        if calls is None:
            return []
        self.rest = ""
        return [event for call in calls for event in events_of(call)]


def is_object(text: str) -> bool:
    """Whether this is a JSON object."""
    try:
        return isinstance(msgspec.json.decode(text.encode("utf-8", "replace")), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


class ChosenReader:
    """Reads whichever of several forms there is, as the block's first characters tell."""

    def __init__(self, choose: Callable[[str], Reader | None]) -> None:
        """`choose` gets the block so far and returns its reader, or None until that is clear."""
        self.state = State.MORE
        self.rest = ""
        self._choose = choose
        self._reader: Reader | None = None

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""
        if self._reader is None:
            text = self.rest = self.rest + text
            self._reader = self._choose(text)
            if self._reader is None:
                return []
        events = self._reader.feed(text)
        self.state, self.rest = self._reader.state, self._reader.rest
        return events

    def close(self) -> list[Event]:
        """End; afterwards `rest` is what was no whole call."""
        if self._reader is None:
            return []
        events = self._reader.close()
        self.rest = self._reader.rest
        return events
