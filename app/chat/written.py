"""Tools and calls as text, for templates that show them to the model in no way of their own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.chat.formats import ToolForm

_INSTRUCTIONS = """You can call these functions, given as JSON schemas, one a line:
{tools}

To call functions, answer with nothing but a JSON object of this form:
{{"tool_calls": [{{"name": "<function's name>", "arguments": {{<its arguments>}}}}]}}
The results will come in the next message. When no function is needed, answer in plain text."""


def tool_instructions(tools: list[dict[str, Any]]) -> str:
    """Return what tells a model without tools of its own which there are and how to call them."""
    return _INSTRUCTIONS.format(tools="\n".join(_json(tool["function"]) for tool in tools))


def written_calls(form: ToolForm, calls: list[dict[str, Any]]) -> str:
    """Return calls, `{"name", "arguments"}` each, as a model of this form writes them; the generic form for most."""
    if form == "lfm2":
        return f"<|tool_call_start|>[{', '.join(map(_python_call, calls))}]<|tool_call_end|>"
    if form == "granite":
        return f"<|tool_call|>{_json(calls)}"
    if form == "phi":
        return f"<|tool_call|>{_json(calls)}<|/tool_call|>"
    return _json({"tool_calls": calls})


def _python_call(call: dict[str, Any]) -> str:
    arguments = call["arguments"]
    if not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    return f"{call['name']}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
