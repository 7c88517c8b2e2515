"""Reasoning that a model writes between two marks before it answers, as `<think>...</think>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.chat.events import Reasoning, Text, joined, undecided

if TYPE_CHECKING:
    from app.chat.events import Event


class ReasoningSplitter:
    """Tells reasoning from the answer behind it. White space next to the marks is dropped."""

    def __init__(self, begin: str, end: str, *, is_open: bool) -> None:
        """Take the marks. `is_open`: the prompt ends behind the first of them."""
        self._begin, self._end = begin, end
        self._text = ""
        self._state = "reasoning" if is_open else "start"
        self._drops_space = True

    @classmethod
    def behind(cls, prompt_end: str, begin: str, end: str) -> ReasoningSplitter:
        """Return the splitter of an answer to a prompt that ends like this."""
        return cls(begin, end, is_open=prompt_end.rstrip().endswith(begin.rstrip()))

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""
        if self._state == "answer" and not self._drops_space:
            return [Text(text)]
        self._text += text
        events: list[Event] = []
        if self._state == "start" and not self._look_for_begin():
            return events
        if self._state == "reasoning":
            self._take_reasoning(events)
        if self._state == "answer":
            self._take_answer(events)
        return joined(events)

    def close(self) -> list[Event]:
        """End; return what was held back."""
        if self._state == "reasoning":
            return joined([Reasoning(self._text.rstrip())])
        return joined([] if self._state == "answer" and self._drops_space else [Text(self._text)])

    def _look_for_begin(self) -> bool:
        """Return whether it is decided if the answer begins with reasoning."""
        text = self._text.lstrip()
        if text.startswith(self._begin):
            self._text, self._state = text[len(self._begin) :], "reasoning"
        elif self._begin.startswith(text):
            return False
        else:
            self._state, self._drops_space = "answer", False
        return True

    def _take_reasoning(self, events: list[Event]) -> None:
        if self._drops_space:
            self._text = self._text.lstrip()
            self._drops_space = not self._text
        reasoning, mark, rest = self._text.partition(self._end)
        if mark:
            events.append(Reasoning(reasoning.rstrip()))
            self._text, self._state, self._drops_space = rest, "answer", True
            return
        known = len(self._text[: len(self._text) - undecided(self._text, (self._end,))].rstrip())
        events.append(Reasoning(self._text[:known]))
        self._text = self._text[known:]

    def _take_answer(self, events: list[Event]) -> None:
        if self._drops_space:
            self._text = self._text.lstrip()
            self._drops_space = not self._text
        events.append(Text(self._text))
        self._text = ""
