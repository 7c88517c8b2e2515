"""LFM2: `<|tool_call_start|>[name(place="Köln", days=2)]<|tool_call_end|>`, in Python, or as JSON."""

from __future__ import annotations

import ast
import json
import warnings
from typing import TYPE_CHECKING, Any

from app.chat.marked import MarkedCalls
from app.chat.readers import Call, ChosenReader, HeldCalls, JsonCalls

if TYPE_CHECKING:
    from app.chat.events import Parser
    from app.chat.readers import Reader, Schemas

BEGIN, END = "<|tool_call_start|>", "<|tool_call_end|>"
MARKS = (BEGIN, END)
_LONGEST = 65536  # characters of calls that are read
_CONSTANTS = {"true": True, "false": False, "null": None}


def python_calls(text: str, schemas: Schemas) -> list[Call] | None:
    """Return the calls of `[name(key=value, ...), ...]`, brackets optional; None if that is anything else."""
    if len(text) > _LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python doesn't know
            body = ast.parse(text.strip(), mode="eval").body
        calls = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
        return [_call(call, schemas) for call in calls] or None
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def _call(node: ast.expr, schemas: Schemas) -> Call:
    """Raise ValueError for what is no call of a known name with keywords."""
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name | ast.Attribute):
        raise ValueError(ast.dump(node))
    name = ast.unparse(node.func)
    if name not in schemas:
        raise ValueError(name)
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(name)
        arguments[keyword.arg] = _value(keyword.value)
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # a lone surrogate, which nobody can be sent, raises a ValueError
    return Call(name, text)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    return ast.literal_eval(node)


def _key(node: ast.expr | None) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise TypeError("a key is a string")
    return node.value


def parser(schemas: Schemas, *, certain: bool) -> Parser:
    """Return a parser of one answer."""

    def choose(text: str) -> Reader | None:
        first = text.lstrip().removeprefix("[").lstrip()[:1]
        if first == "{":
            return JsonCalls(schemas, certain=certain)
        return HeldCalls((END,), lambda text: python_calls(text, schemas)) if first else None

    return MarkedCalls(lambda: ChosenReader(choose), (BEGIN,), (END,))
