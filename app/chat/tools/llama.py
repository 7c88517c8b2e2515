"""Llama 3.x: an answer that is `{"name": ..., "parameters": {...}}`, several with `;`; `<|python_tag|>` before them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.chat.marked import MarkedCalls
from app.chat.readers import JsonCalls

if TYPE_CHECKING:
    from app.chat.events import Parser
    from app.chat.readers import Schemas

BEGIN = "<|python_tag|>"
MARKS = (BEGIN,)


def parser(schemas: Schemas, *, certain: bool) -> Parser:
    """Return a parser of one answer."""
    return MarkedCalls(lambda: JsonCalls(schemas, certain=certain, several=True), (BEGIN,), leading=("{", "["))
