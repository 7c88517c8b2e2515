"""Gemma 4: `<|tool_call>call:name{place:<|"|>Köln<|"|>,days:2}<tool_call|>`; FunctionGemma with other marks."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from app.chat.marked import MarkedCalls
from app.chat.readers import Call, ChosenReader, HeldCalls, NamedCall

if TYPE_CHECKING:
    from app.chat.events import Parser
    from app.chat.readers import Reader, Schemas

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
OLD_BEGIN, OLD_END, OLD_QUOTE = "<start_function_call>", "<end_function_call>", "<escape>"
MARKS = (BEGIN, END, QUOTE, OLD_BEGIN, OLD_END, OLD_QUOTE)
_DEEPEST = 50  # nested objects and arrays
_JSON_HEAD = re.compile(r"\s*+call:([\w.-]{1,64}+)\s*+(?=\{)")
_HEAD = re.compile(r"\s*+call:([\w.-]{1,64}+)\s*+\{\s*+")
_HEAD_SO_FAR = re.compile(r"\s*+(c(a(l(l(:([\w.-]{0,64}+\s*+(\{\s*+)?)?)?)?)?)?)?")
_WORD = re.compile(r"[^\s,:{}\[\]<]+")
_SPACE = re.compile(r"\s*")
_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "null": None}


class _Values:
    """Reads the values of one call. Raises ValueError for what is none."""

    def __init__(self, text: str, at: int, quotes: tuple[str, ...]) -> None:
        self.text = text
        self.at = at
        self._quotes = quotes

    def object_after_bracket(self, depth: int) -> dict[str, Any]:
        """Return the object whose `{` has been read; leave the place behind its `}`."""
        found: dict[str, Any] = {}
        while not self._take("}"):
            if found and not self._take(","):
                raise ValueError("a comma is missing")
            key = self._string()
            if key is None:
                key = self._word()
            if not self._take(":"):
                raise ValueError("a key has no value")
            found[key] = self._value(depth + 1)
        return found

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("nested too deep")
        if self._take("{"):
            return self.object_after_bracket(depth)
        if self._take("["):
            items: list[Any] = []
            while not self._take("]"):
                if items and not self._take(","):
                    raise ValueError("a comma is missing")
                items.append(self._value(depth + 1))
            return items
        text = self._string()
        if text is not None:
            return text
        word = self._word()
        return _CONSTANTS[word] if word in _CONSTANTS else _number(word)

    def _string(self) -> str | None:
        for quote in self._quotes:
            if self._take(quote):
                end = self.text.index(quote, self.at)
                text, self.at = self.text[self.at : end], end + len(quote)
                return text
        return None

    def _word(self) -> str:
        self._skip()
        word = _WORD.match(self.text, self.at)
        if word is None:
            raise ValueError("a value is missing")
        self.at = word.end()
        return word[0]

    def _take(self, token: str) -> bool:
        self._skip()
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def _skip(self) -> None:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at


def _number(word: str) -> int | float:
    value = json.loads(word)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise ValueError(word)
    return value


def _calls(text: str, schemas: Schemas) -> list[Call] | None:
    head = _HEAD.match(text)
    if head is None or head[1] not in schemas:
        return None
    values = _Values(text, head.end(), (QUOTE, OLD_QUOTE))
    try:
        arguments = values.object_after_bracket(0)
    except ValueError:
        return None
    if text[values.at :].strip():
        return None
    return [Call(head[1], json.dumps(arguments, ensure_ascii=False))]


def parser(schemas: Schemas, *, certain: bool) -> Parser:
    """Return a parser of one answer. Arguments that are JSON, as a grammar has them, are read as well."""

    def choose(text: str) -> Reader | None:
        head = _HEAD.match(text)
        if head is not None and head.end() < len(text):
            if text[head.end()] == '"':
                return NamedCall(schemas, _JSON_HEAD, _HEAD_SO_FAR, certain=certain)
        elif _HEAD_SO_FAR.fullmatch(text):
            return None
        return HeldCalls((END, OLD_END), lambda body: _calls(body, schemas))

    return MarkedCalls(lambda: ChosenReader(choose), (BEGIN, OLD_BEGIN), (END, OLD_END))
