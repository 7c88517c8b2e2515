"""Phi-4 mini: `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`, or `functools[...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.chat.marked import MarkedCalls
from app.chat.readers import JsonCalls

if TYPE_CHECKING:
    from app.chat.events import Parser
    from app.chat.readers import Schemas

BEGIN, END = "<|tool_call|>", "<|/tool_call|>"
_OTHER_BEGIN = "functools"
MARKS = (BEGIN, END)


def parser(schemas: Schemas, *, certain: bool) -> Parser:
    """Return a parser of one answer."""
    return MarkedCalls(lambda: JsonCalls(schemas, certain=certain, several=True), (BEGIN, _OTHER_BEGIN), (END,))
