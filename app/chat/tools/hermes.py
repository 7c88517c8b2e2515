"""Hermes, Qwen 2.5 and 3, Granite 4 and others: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.chat.marked import MarkedCalls
from app.chat.readers import JsonCalls

if TYPE_CHECKING:
    from app.chat.events import Parser
    from app.chat.readers import Schemas

BEGIN, END = "<tool_call>", "</tool_call>"
MARKS = (BEGIN, END)


def parser(schemas: Schemas, *, certain: bool) -> Parser:
    """Return a parser of one answer."""
    return MarkedCalls(lambda: JsonCalls(schemas, certain=certain), (BEGIN,), (END,))
