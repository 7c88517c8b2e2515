"""The messages of a chat, and how the text child gets them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.errors import RequestError, UnsupportedFieldError

CallId = Annotated[str, Meta(min_length=1, max_length=256)]
FunctionName = Annotated[str, Meta(min_length=1, max_length=128)]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A part of a message that is text."""

    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    """A part in which an assistant declined to answer."""


class ImagePart(msgspec.Struct, frozen=True, tag_field="type", tag="image_url"):
    """An image."""


class AudioPart(msgspec.Struct, frozen=True, tag_field="type", tag="input_audio"):
    """Recorded sound."""


class FilePart(msgspec.Struct, frozen=True, tag_field="type", tag="file"):
    """A file."""


Part = TextPart | RefusalPart | ImagePart | AudioPart | FilePart
Content = str | list[Part]


class SystemMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="system"):
    """What the model is told to be."""

    content: Content
    name: str | None = None


class DeveloperMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="developer"):
    """OpenAI's newer name of the system message; models' templates know the older one."""

    content: Content
    name: str | None = None


class UserMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="user"):
    """What the person says."""

    content: Content
    name: str | None = None


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was called, with its arguments as a string of JSON."""

    name: FunctionName
    arguments: str


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """One call of an earlier answer."""

    id: CallId
    function: CalledFunction
    index: int | None = None  # clients that put streams together leave it there


class CustomCall(msgspec.Struct, frozen=True, tag_field="type", tag="custom"):
    """A call of a tool that takes free text."""


class AssistantMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="assistant"):
    """What the model said; clients send back all fields of its message, null ones too."""

    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    audio: Any = None
    function_call: CalledFunction | None = None
    tool_calls: list[FunctionCall | CustomCall] | None = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None


class ToolMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="tool"):
    """The result of a tool."""

    content: Content
    tool_call_id: CallId
    name: str | None = None


class FunctionMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="function"):
    """The result of a function, in OpenAI's oldest way."""

    name: FunctionName
    content: Content | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage
Templated = dict[str, Any]


def templated(messages: list[Message]) -> list[Templated]:
    """Return messages with the roles that templates know: system, user, assistant and tool.

    Text is a string, or a list of several parts. Raises RequestError and UnsupportedFieldError naming the field.
    """
    found: list[Templated] = []
    old_call = ""  # the id that stands for the last `function_call`, which had none
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if isinstance(message, AssistantMessage):
            old_call = f"call_{index}" if message.function_call else old_call
            found.append(_assistant(message, place, old_call))
        elif isinstance(message, ToolMessage):
            name = {"name": message.name} if message.name else {}
            content = _text(message.content, place)
            found.append({"role": "tool", "tool_call_id": message.tool_call_id, "content": content, **name})
        elif isinstance(message, FunctionMessage):
            content = "" if message.content is None else _text(message.content, place)
            given = {"tool_call_id": old_call or f"call_{index}", "content": content, "name": message.name}
            found.append({"role": "tool", **given})
        else:
            role: Literal["user", "system"] = "user" if isinstance(message, UserMessage) else "system"
            found.append({"role": role, "content": _text(message.content, place)})
    return found


def _assistant(message: AssistantMessage, place: str, old_call: str) -> Templated:
    if message.audio is not None:
        param = f"{place}.audio"
        raise UnsupportedFieldError(f"'{param}' is not supported: leave it out, or send null", param=param)
    given: Templated = {"role": "assistant", "content": message.refusal}
    if message.content is not None:
        given["content"] = _text(message.content, place)
    if calls := _calls(message, place, old_call):
        given["tool_calls"] = calls
    elif given["content"] is None:
        raise RequestError(
            f"'{place}.content' is null or missing: an assistant's message without tool calls needs a string, or parts "
            "of type text",
            param=f"{place}.content",
        )
    if message.reasoning_content:
        given["reasoning_content"] = message.reasoning_content
    return given


def _calls(message: AssistantMessage, place: str, old_call: str) -> list[Templated]:
    if message.function_call is not None:
        if message.tool_calls:
            param = f"{place}.function_call"
            raise RequestError(f"'{param}' and '{place}.tool_calls' mean the same: send one of them", param=param)
        return [_call(old_call, message.function_call)]
    calls = []
    for number, call in enumerate(message.tool_calls or []):
        if isinstance(call, CustomCall):
            param = f"{place}.tool_calls[{number}].type"
            raise UnsupportedFieldError(f"'{param}' is 'custom': tools are of type function here", param=param)
        calls.append(_call(call.id, call.function))
    return calls


def _call(number: str, function: CalledFunction) -> Templated:
    return {"id": number, "type": "function", "function": {"name": function.name, "arguments": function.arguments}}


def _text(content: Content, place: str) -> str | list[Templated]:
    if isinstance(content, str):
        return content
    if not content:
        raise RequestError(f"'{place}.content' is empty: send a string or at least one part", param=f"{place}.content")
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, TextPart):
            param = f"{place}.content[{index}].type"
            kind = part.__struct_config__.tag
            raise UnsupportedFieldError(f"'{param}' is {kind!r}: this model reads parts of type text only", param=param)
        parts.append({"type": "text", "text": part.text})
    return parts[0]["text"] if len(parts) == 1 else parts
