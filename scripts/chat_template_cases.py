"""Chats over which `compare_chat_templates.py` renders every template, as OpenAI's clients send them."""

from __future__ import annotations

from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place <now> & later.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A city."},
                "days": {"type": "integer", "description": "How far ahead."},
            },
            "required": ["place"],
        },
    },
}
SUM = {
    "type": "function",
    "function": {
        "name": "add_numbers",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"numbers": {"type": "array", "items": {"type": "number"}, "description": "What to add."}},
            "required": ["numbers"],
        },
    },
}
_SYSTEM = {"role": "system", "content": "You are brief."}
_HELLO = {"role": "user", "content": "Grüß dich <b>&</b> 'you'"}
_ANSWER = {"role": "assistant", "content": "Good day."}
_ASK = {"role": "user", "content": "How is the weather in Köln?"}


def _call(number: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


_CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [_call("call00001", "get_weather", '{"place": "Köln", "days": 2}')],
}
_TWO_CALLS = {
    **_CALLING,
    "tool_calls": [*_CALLING["tool_calls"], _call("call00002", "add_numbers", '{"numbers": [1, 2.5]}')],
}
_RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"degrees": 21}'}
_SECOND = {"role": "tool", "tool_call_id": "call00002", "name": "add_numbers", "content": "3.5"}
_PARTS = {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]}

CASES: dict[str, dict[str, Any]] = {
    "user": {"messages": [_HELLO]},
    "system": {"messages": [_SYSTEM, _HELLO]},
    "turns": {"messages": [_SYSTEM, _HELLO, _ANSWER, _ASK]},
    "no prompt": {"messages": [_HELLO, _ANSWER], "add_generation_prompt": False},
    "continue": {"messages": [_HELLO, _ANSWER], "add_generation_prompt": False, "continue_final_message": True},
    "parts": {"messages": [_PARTS]},
    "tools": {"messages": [_SYSTEM, _ASK], "tools": [WEATHER, SUM]},
    "call": {"messages": [_SYSTEM, _ASK, _CALLING, _RESULT], "tools": [WEATHER, SUM]},
    "two calls": {"messages": [_ASK, _TWO_CALLS, _RESULT, _SECOND], "tools": [WEATHER, SUM]},
    "after": {
        "messages": [_ASK, _CALLING, _RESULT, {"role": "assistant", "content": "Warm."}, _HELLO],
        "tools": [WEATHER],
    },
    "thinking": {"messages": [_HELLO], "template_arguments": {"enable_thinking": True, "thinking": True}},
    "no thinking": {"messages": [_HELLO], "template_arguments": {"enable_thinking": False, "thinking": False}},
    "documents": {"messages": [_ASK], "documents": [{"title": "Köln", "text": "Sunny."}]},
}
