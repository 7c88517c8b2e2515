"""Granite 3: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.chat.marked import MarkedCalls
from app.chat.readers import JsonCalls

if TYPE_CHECKING:
    from app.chat.events import Parser
    from app.chat.readers import Schemas

BEGIN = "<|tool_call|>"
MARKS = (BEGIN,)


def parser(schemas: Schemas, *, certain: bool) -> Parser:
    """Return a parser of one answer."""
    return MarkedCalls(lambda: JsonCalls(schemas, certain=certain, several=True), (BEGIN,))
