"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`; newer ones `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from app.chat.marked import MarkedCalls
from app.chat.readers import ChosenReader, JsonCalls, NamedCall

if TYPE_CHECKING:
    from app.chat.events import Parser
    from app.chat.readers import Reader, Schemas

BEGIN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
MARKS = (BEGIN, ARGUMENTS, CALL_ID)
_HEAD = re.compile(r"\s*+([\w.-]{1,64}+)\s*+(?:\[CALL_ID\][\w-]{0,64}+)?(?:\[ARGS\])?\s*+(?=\{)")
_HEAD_SO_FAR = re.compile(r"\s*+[\w.-]{0,64}+\s*+(?:\[[\w\]-]{0,80}+)?\s*+(?:\[[ARGS\]]{0,5}+)?\s*+")


def parser(schemas: Schemas, *, certain: bool) -> Parser:
    """Return a parser of one answer."""

    def choose(text: str) -> Reader | None:
        first = text.lstrip()[:1]
        if first and first in "[{":
            return JsonCalls(schemas, certain=certain)
        return NamedCall(schemas, _HEAD, _HEAD_SO_FAR, certain=certain) if first else None

    return MarkedCalls(lambda: ChosenReader(choose), (BEGIN,))
