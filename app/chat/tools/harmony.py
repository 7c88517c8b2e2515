"""gpt-oss (harmony): messages in channels, `<|channel|>analysis<|message|>...<|end|><|start|>assistant...`.

analysis is reasoning, final is content; what is addressed `to=functions.name` is a call, its text the arguments.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from app.chat.brackets import Brackets
from app.chat.events import CallArguments, CallBegin, Event, Reasoning, Text, joined, undecided
from app.chat.readers import Call, events_of, is_object

if TYPE_CHECKING:
    from app.chat.readers import Schemas

START, CHANNEL, MESSAGE, END, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>"
CALL, RETURN = "<|call|>", "<|return|>"
MARKS = (START, CHANNEL, MESSAGE, END, CONSTRAIN)
_ENDS = (END, CALL, RETURN, START)
_RECIPIENT = re.compile(r"to=functions\.([\w.-]{1,128})")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_LONGEST_HEAD = 512


class _HarmonyParser:
    def __init__(self, schemas: Schemas, *, certain: bool) -> None:
        self._schemas = schemas
        self._certain = certain
        self._text = ""
        self._head: str | None = None  # of the message that is being read; None between messages
        self._kind: type[Text | Reasoning] = Text
        self._call: str | None = None
        self._begun = False

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""
        self._text += text
        events: list[Event] = []
        while self._read_head(events) if self._head is None else self._read_body(events):
            pass
        return joined(events)

    def close(self) -> list[Event]:
        """End; return what was held back. A call that is not whole is content, unless it has begun."""
        events: list[Event] = []
        if self._head is None:
            if not self._text.startswith("<|"):
                events.append(Text(self._text))
        elif self._call is None:
            events.append(self._kind(self._text))
        elif not self._begun:
            self._end_call(events, self._text)
        return joined(events)

    def _read_head(self, events: list[Event]) -> bool:
        """Read up to `<|message|>`; text that no head stands before is content."""
        if not self._text:
            return False
        if not any(self._text.startswith(mark) or mark.startswith(self._text) for mark in (*MARKS, *_ENDS, " to=")):
            self._open("", Text, None)
            return True
        head, mark, rest = self._text.partition(MESSAGE)
        if not mark:
            if len(self._text) > _LONGEST_HEAD:
                self._open("", Text, None)
                return True
            return False
        recipient, channel = _RECIPIENT.search(head), _CHANNEL.search(head)
        if recipient is not None and recipient[1] in self._schemas:
            self._open(head + mark, Text, recipient[1])
        else:
            self._open(head + mark, Reasoning if channel and channel[1] == "analysis" else Text, None)
        self._text = rest
        if self._call is not None and self._certain:
            events.append(CallBegin(self._call))
            self._begun = True
        return True

    def _open(self, head: str, kind: type[Text | Reasoning], call: str | None) -> None:
        self._head, self._kind, self._call, self._begun = head, kind, call, False

    def _read_body(self, events: list[Event]) -> bool:
        """Pass a message's text on, up to its end."""
        found = [(place, mark) for mark in _ENDS if (place := self._text.find(mark)) >= 0]
        if not found:
            if self._call is None or self._begun:
                known = len(self._text) - undecided(self._text, _ENDS)
                self._say(events, self._text[:known])
                self._text = self._text[known:]
            return False
        place, mark = min(found)
        body = self._text[:place]
        self._text = self._text[place + (0 if mark == START else len(mark)) :]
        if self._call is None or self._begun:
            self._say(events, body)
        else:
            self._end_call(events, body)
        self._head = None
        return True

    def _say(self, events: list[Event], text: str) -> None:
        events.append(CallArguments(text) if self._call is not None else self._kind(text))

    def _end_call(self, events: list[Event], body: str) -> None:
        end = Brackets().end(body)
        arguments = body[:end].strip() if end >= 0 else ""
        if self._call is not None and is_object(arguments) and not body[end:].strip():
            events += events_of(Call(self._call, arguments))
        else:
            events.append(Text((self._head or "") + body))


def parser(schemas: Schemas, *, certain: bool) -> _HarmonyParser:
    """Return a parser of one answer; it tells reasoning, too."""
    return _HarmonyParser(schemas, certain=certain)
