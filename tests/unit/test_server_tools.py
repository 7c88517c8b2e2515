"""Chats with tools, their messages and their template's arguments: what the pool is asked for, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from app.errors import RequestError, UnsupportedFieldError
from app.pool.chat_request import grammar_asked, shown_tokens
from app.pool.request import ChatPrompt, ModelInfo
from app.server.schema.chat import decode_chat

USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": SCHEMA, "strict": None},
}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "now"}}
REQUIRED: dict[str, Any] = {"tools": [WEATHER, NOW], "tool_choice": "required"}


def chat(**changes: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "messages": [USER], **changes})


def asked(**changes: Any) -> Any:
    return decode_chat(chat(**changes)).generation_request("r")


def prompt(**changes: Any) -> ChatPrompt:
    (found,) = asked(**changes).prompts
    assert isinstance(found, ChatPrompt)
    return found


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("choice", "names", "required", "parallel"),
    [
        (None, ["weather", "now"], False, True),
        ("auto", ["weather", "now"], False, True),
        ("required", ["weather", "now"], True, True),
        (NAMED, ["now"], True, False),
        (allowed("auto", "weather"), ["weather"], False, True),
        (allowed("required", "now", "weather"), ["weather", "now"], True, True),
    ],
)
def test_choices(choice: Any, names: list[str], required: bool, parallel: bool) -> None:
    use = asked(tools=[WEATHER, NOW], tool_choice=choice).tools
    assert [tool["function"]["name"] for tool in use.tools] == list(use.schemas) == names
    assert (use.required, use.parallel) == (required, parallel)
    assert prompt(tools=[WEATHER, NOW], tool_choice=choice).tools == use.tools


def test_templates_get_tools_without_empty_fields() -> None:
    parameters = {"type": "object", "properties": {}}
    assert prompt(tools=[NOW]).tools == [{"type": "function", "function": {"name": "now", "parameters": parameters}}]
    (tool,) = prompt(tools=[WEATHER]).tools
    assert tool["function"] == {"name": "weather", "description": "d", "parameters": SCHEMA}


def test_no_tools_no_calls() -> None:
    without: list[dict[str, Any]] = [
        {},
        {"tools": []},
        {"tools": [NOW], "tool_choice": "none"},
        {"tool_choice": "auto"},
    ]
    for changes in without:
        assert asked(**changes).tools is None
        assert prompt(**changes).tools == []
    assert not asked(tools=[NOW], parallel_tool_calls=False).tools.parallel
    assert decode_chat(chat(parallel_tool_calls=True)).names_without_effect() == ["parallel_tool_calls"]
    assert decode_chat(chat(tools=[NOW], parallel_tool_calls=True)).names_without_effect() == []
    assert decode_chat(chat(tools=[NOW], tool_choice="none")).names_without_effect() == ["tools"]


def tool(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **changes}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "magic"}]}, "tools[0].type"),
    ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
    ({"tools": [tool(name="")]}, "tools[0].function.name"),
    ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
    ({"tools": [tool(colour=1)]}, "tools[0].function.colour"),
    ({"tools": [tool(), tool()]}, "tools[1].function.name"),
    ({"tools": [tool(name=f"f{number}") for number in range(129)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type"),
    ({"tools": [NOW], "tool_choice": tool(name="other")}, "tool_choice.function.name"),
    ({"tools": [NOW], "tool_choice": allowed("auto", "now", "x")}, "tool_choice.allowed_tools.tools[1].function.name"),
    ({"tools": [NOW], "tool_choice": allowed("maybe", "now")}, "tool_choice.allowed_tools.mode"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "function_call": {"name": "f", "arguments": "{}"},
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}],
                }
            ]
        },
        "messages[0].function_call",
    ),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {"enable_thinking": {"a": 1}}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"thinking": "x" * 257}}, "chat_template_kwargs.thinking"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    (
        {
            "continue_final_message": True,
            "add_generation_prompt": True,
            "messages": [USER, {"role": "assistant", "content": "x"}],
        },
        "add_generation_prompt",
    ),
    ({"documents": ["x"]}, "documents[0]"),
]


@pytest.mark.parametrize(("changes", "param"), BAD, ids=[case[1] for case in BAD])
def test_what_is_wrong_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        asked(**changes)
    assert caught.value.param == param
    assert param in caught.value.message


def test_messages_of_tools() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{**call, "index": 0}], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": "", "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "one"},
    ]
    assert prompt(messages=messages).messages == [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "call_3"}]},
        {"role": "tool", "tool_call_id": "call_3", "name": "now", "content": "one"},
    ]


def test_template_arguments() -> None:
    assert prompt().template_arguments == {}
    assert prompt(chat_template_kwargs={"enable_thinking": False}).template_arguments == {"enable_thinking": False}
    effort = prompt(reasoning_effort="low", chat_template_kwargs={"thinking": False}).template_arguments
    assert effort == {"reasoning_effort": "low", "enable_thinking": True, "thinking": False}
    assert prompt(reasoning_effort="none").template_arguments["enable_thinking"] is False


def test_what_a_template_does_not_look_at_is_without_effect() -> None:
    request = decode_chat(chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": True}))
    deaf, hearing = (
        ModelInfo(id="m", created=1),
        ModelInfo(id="m", created=1, template_variables=frozenset({"enable_thinking"})),
    )
    assert request.names_without_effect(deaf) == ["reasoning_effort", "chat_template_kwargs.enable_thinking"]
    assert request.names_without_effect(hearing) == []


def test_unfinished_messages() -> None:
    messages = [USER, {"role": "assistant", "content": "Once"}]
    continued = prompt(messages=messages, continue_final_message=True)
    assert (continued.continue_final_message, continued.add_generation_prompt) == (True, False)
    assert prompt().add_generation_prompt
    assert not prompt(messages=messages, add_generation_prompt=False).add_generation_prompt


def test_grammars_of_calls() -> None:
    json_format = {"type": "json_object"}
    assert grammar_asked(asked()) is None
    calls = grammar_asked(asked(**REQUIRED))
    assert calls is not None
    assert (calls.kind, calls.param) == ("tool_calls", "tools")
    assert msgspec.json.decode(calls.source)["required"] is True
    either = grammar_asked(asked(tools=[NOW], response_format=json_format))
    assert either is not None
    assert (either.kind, either.param) == ("tool_calls", "response_format")
    assert msgspec.json.decode(either.source)["otherwise"] == '{"type": "object"}'
    with pytest.raises(RequestError, match="guided_regex") as caught:
        grammar_asked(asked(tools=[NOW], guided_regex="a"))
    assert caught.value.param == "guided_regex"
    assert not isinstance(caught.value, UnsupportedFieldError)


def test_marks_are_shown_only_where_they_are_read() -> None:
    plain = ModelInfo(id="m", created=1, tool_form="mistral")
    thinking = ModelInfo(id="m", created=1, tool_form="hermes", reasoning_marks=("<think>", "</think>"))
    assert shown_tokens(asked(), plain) == ()
    assert "[TOOL_CALLS]" in shown_tokens(asked(tools=[NOW]), plain)
    assert shown_tokens(asked(), thinking) == ("<think>", "</think>")
    assert "<|channel|>" in shown_tokens(asked(), ModelInfo(id="m", created=1, tool_form="harmony"))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'"chat_template_kwargs":{"thinking_budget":1%s}' % (b"0" * 30), "chat_template_kwargs.thinking_budget"),
        (b'"documents":[{"a":[{"b":18446744073709551616}]}]', "documents"),
        (
            b'"tools":[{"type":"function","function":{"name":"f","parameters":{"maximum":18446744073709551616}}}]',
            "tools[0].function.parameters",
        ),
        (
            b'"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"array"}}}]',
            "tools[0].function.parameters.type",
        ),
        (b'"tools":[{"type":"function","function":{"name":"f\\n"}}]', "tools[0].function.name"),
    ],
)
def test_what_no_frame_or_function_can_hold_is_refused(body: bytes, param: str) -> None:
    whole = b'{"model":"m","messages":[{"role":"user","content":"hi"}],%s}' % body
    with pytest.raises(RequestError) as caught:
        decode_chat(whole).generation_request("r")
    assert caught.value.param == param


def test_integers_of_64_bits_go_through() -> None:
    big = {"properties": {"a": {"minimum": -(2**63), "maximum": 2**64 - 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": big}}
    assert asked(tools=[tool]).tools.schemas == {"f": big}
