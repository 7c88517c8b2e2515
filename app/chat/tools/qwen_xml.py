"""Qwen3-Coder, Qwen 3.5: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import msgspec

from app.chat.marked import MarkedCalls
from app.chat.readers import Call, ChosenReader, HeldCalls, JsonCalls

if TYPE_CHECKING:
    from app.chat.events import Parser
    from app.chat.readers import Reader, Schemas

BEGIN, END = "<tool_call>", "</tool_call>"
MARKS = (BEGIN, END)
_FUNCTION_END = "</function>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _calls(text: str, schemas: Schemas) -> list[Call] | None:
    if not text.rstrip().endswith(_FUNCTION_END):
        return None  # at once: the pattern would look for it from every place
    calls = []
    at = 0
    while at < len(text):
        function = _FUNCTION.match(text, at)
        if function is None or function[1] not in schemas:
            return None
        arguments = _arguments(function[2], schemas[function[1]])
        if arguments is None:
            return None
        calls.append(Call(function[1], json.dumps(arguments, ensure_ascii=False)))
        at = function.end()
    return calls or None


def _arguments(text: str, schema: dict[str, Any]) -> dict[str, Any] | None:
    arguments: dict[str, Any] = {}
    at, end = 0, len(text.rstrip())
    while at < end:
        parameter = _PARAMETER.match(text, at)
        if parameter is None:
            return None
        arguments[parameter[1]] = _value(parameter[2], schema, parameter[1])
        at = parameter.end()
    return arguments


def _value(text: str, schema: dict[str, Any], name: str) -> Any:
    """Return a value as its schema wants it: text for strings, else JSON if it is that."""
    properties = schema.get("properties")
    wanted = properties.get(name) if isinstance(properties, dict) else None
    if isinstance(wanted, dict) and wanted.get("type") == "string":
        return text
    try:
        return msgspec.json.decode(text.encode("utf-8", "replace"))
    except (msgspec.DecodeError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


def parser(schemas: Schemas, *, certain: bool) -> Parser:
    """Return a parser of one answer. Calls that are JSON, as a grammar has them, are read as well."""

    def choose(text: str) -> Reader | None:
        first = text.lstrip()[:1]
        if first == "{":
            return JsonCalls(schemas, certain=certain)
        return HeldCalls((END,), lambda body: _calls(body, schemas)) if first else None

    return MarkedCalls(lambda: ChosenReader(choose), (BEGIN,), (END,))
