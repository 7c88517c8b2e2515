"""Tools through OpenAI's own client against a real server, whose small model calls because a grammar has it call."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

MESSAGES: list[Any] = [{"role": "user", "content": "How warm is it in Paris? Use a function."}]
WEATHER = {
    "type": "object",
    "properties": {"place": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["place", "days"],
    "additionalProperties": False,
}
LEVEL = {
    "type": "object",
    "properties": {"level": {"enum": ["low", "high"]}},
    "required": ["level"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "set_level": LEVEL}
TOOLS: list[Any] = [{"type": "function", "function": {"name": name, "parameters": SCHEMAS[name]}} for name in SCHEMAS]
ONE_CALL: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 80, "temperature": 0}


class SetLevel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    level: Literal["low", "high"]


def check_calls(calls: list[tuple[str, str]]) -> None:
    assert calls
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def whole(client: openai.OpenAI, model: str, **options: Any) -> ChatCompletion:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, **{**ONE_CALL, **options})
    return ChatCompletion.model_validate(answer.model_dump())


def named_calls(answer: ChatCompletion) -> list[tuple[str, str]]:
    calls: list[Any] = answer.choices[0].message.tool_calls or []
    return [(call.function.name, call.function.arguments) for call in calls]


def test_required(client: openai.OpenAI, model: str) -> None:
    answer = whole(client, model, tool_choice="required")
    check_calls(named_calls(answer))
    assert answer.choices[0].message.content is None
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 5


def test_required_streamed_in_pieces(client: openai.OpenAI, model: str) -> None:
    calls: list[list[str]] = []
    pieces = 0
    reasons = []
    options = {**ONE_CALL, "parallel_tool_calls": True, "n": 1, "tool_choice": "required", "max_tokens": 300}
    for chunk in client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **options):
        ChatCompletionChunk.model_validate(chunk.model_dump())
        (choice,) = chunk.choices
        assert not choice.delta.content
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.id:
                assert call.index == len(calls)
                calls.append([call.function.name or "", ""])
            else:
                assert (call.type, call.function.name) == (None, None)
            calls[call.index][1] += call.function.arguments or ""
            pieces += 1
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert reasons in (["tool_calls"], ["length"])
    check_calls([(name, arguments) for name, arguments in (calls if reasons == ["tool_calls"] else calls[:-1])])
    assert pieces > 3 * len(calls)


def test_timings_go_with_calls(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {**ONE_CALL, "tool_choice": "required", "extra_body": {"timings_per_token": True}}
    answer: Any = client.chat.completions.create(model=model, messages=MESSAGES, **options)
    check_calls(named_calls(answer))
    assert answer.timings["predicted_n"] == answer.usage.completion_tokens
    arguments, counted = "", []
    chunk: Any
    for chunk in list(client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **options))[1:]:
        counted.append(chunk.timings["predicted_n"])
        for call in chunk.choices[0].delta.tool_calls or []:
            arguments += call.function.arguments or ""
    assert arguments == named_calls(answer)[0][1]
    assert counted == sorted(counted)
    assert counted[-1] == answer.usage.completion_tokens


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ({"type": "function", "function": {"name": "set_level"}}, "set_level"),
        ({"type": "function", "function": {"name": "get_weather"}}, "get_weather"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "set_level"}}],
                },
            },
            "set_level",
        ),
    ],
)
def test_named_and_allowed(client: openai.OpenAI, model: str, choice: Any, name: str) -> None:
    calls = named_calls(whole(client, model, tool_choice=choice))
    assert [called for called, _ in calls] == [name]
    check_calls(calls)


def test_several_choices_each_call(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, **{**ONE_CALL, "temperature": 1, "n": 3, "seed": 3}, tool_choice="required"
    )
    for choice in answer.choices:
        calls: list[Any] = choice.message.tool_calls or []
        check_calls([(call.function.name, call.function.arguments) for call in calls])
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
    assert len(set(ids)) == len(ids) == 3


def test_none_and_auto_answer_in_text(client: openai.OpenAI, model: str) -> None:
    without = whole(client, model, tool_choice="none", max_tokens=8)
    assert (without.choices[0].message.tool_calls, without.choices[0].finish_reason) == (None, "length")
    shown = whole(client, model, tool_choice="auto", max_tokens=8)
    assert without.usage is not None
    assert shown.usage is not None
    assert shown.usage.prompt_tokens > without.usage.prompt_tokens + 50  # the model is told of its tools


def test_json_or_a_call(client: openai.OpenAI, model: str) -> None:
    answer_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": LEVEL}}
    answer = whole(client, model, response_format=answer_format)
    if calls := named_calls(answer):
        check_calls(calls)
    else:
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), LEVEL)


def test_results_go_back_in(client: openai.OpenAI, model: str) -> None:
    first = whole(client, model, tool_choice="required")
    message = first.choices[0].message
    assert message.tool_calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in message.tool_calls]
    messages = [*MESSAGES, message.model_dump(), *results]
    answer = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, max_tokens=12, temperature=0)
    assert answer.usage is not None
    assert first.usage is not None
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens + 20


def test_the_clients_own_stream_parses_pydantic_tools(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model,
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(SetLevel, name="set_level")],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=80,
        temperature=0,
    ) as stream:
        events = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in events
    assert "tool_calls.function.arguments.done" in events
    assert message.tool_calls
    assert isinstance(message.tool_calls[0].function.parsed_arguments, SetLevel)


def test_an_unfinished_message_is_gone_on_with(client: openai.OpenAI, model: str) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "Count to five."},
        {"role": "assistant", "content": "One, two, three,"},
    ]
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=4, temperature=0, extra_body={"continue_final_message": True}
    )
    assert "four" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "tools"),
        ({"extra_body": {"documents": [{"text": "x"}]}, "tools": [], "tool_choice": "none"}, "documents"),
        ({"extra_body": {"chat_template_kwargs": {"eos_token": "x"}}}, "chat_template_kwargs.eos_token"),
        ({"extra_body": {"guided_regex": "a"}, "tool_choice": "auto"}, "guided_regex"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    client: openai.OpenAI, model: str, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        whole(client, model, **{"tool_choice": "required", **options})
    assert caught.value.param == param


def test_what_has_no_effect_is_named(client: openai.OpenAI, model: str) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=MESSAGES,
        max_tokens=1,
        reasoning_effort="low",
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    assert raw.headers["x-pestle-no-effect"] == "reasoning_effort, chat_template_kwargs.enable_thinking"
