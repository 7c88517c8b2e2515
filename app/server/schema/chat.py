"""The request of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from app.errors import RequestError, UnsupportedFieldError
from app.pool.request import ChatPrompt, GenerationRequest
from app.server.schema.common import CommonRequest, Count, TopLogprobs
from app.server.schema.decode import decode
from app.server.schema.fields import CHAT, refuse_what_would_change_the_answer, without_effect
from app.server.schema.structured import grammar_source

MAX_MESSAGES = 4096
_BREAKPOINT = "messages[].content[].prompt_cache_breakpoint"


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


class AssistantMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="assistant"):
    """What the model said; clients send back all fields of its message, null ones too."""

    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    annotations: list[Any] | None = None


class ToolMessage(msgspec.Struct, frozen=True, tag_field="role", tag="tool"):
    """The result of a tool."""


class FunctionMessage(msgspec.Struct, frozen=True, tag_field="role", tag="function"):
    """The result of a function, in OpenAI's oldest way."""


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage


class ChatRequest(CommonRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body; what becomes of each field stands in `fields.CHAT`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    moderation: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None

    def generation_request(self, request_id: str, client: str = "") -> GenerationRequest:
        """Return what to ask the pool for; raises RequestError for fields that contradict each other."""
        max_tokens, max_tokens_param = self._max_tokens()
        return GenerationRequest(
            prompts=[ChatPrompt([_normalised(message, index) for index, message in enumerate(self.messages)])],
            n=self.n or 1,
            max_tokens=max_tokens,
            max_tokens_param=max_tokens_param,
            sampling=self.sampling(),
            stop=self.stops(),
            ignore_eos=self.ignore_eos is True,
            min_tokens=self.least_tokens(max_tokens),
            stop_tokens=self.stop_token_ids or [],
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            request_id=request_id,
            client=client,
            priority=self.priority or 0,
            grammar=grammar_source(self),
            reuse_prefix=self.cache_prompt is not False,
            timings_per_token=self.timings_per_token is True,
        )

    def names_without_effect(self) -> list[str]:
        """Return the names of the fields that were sent and cannot change the answer."""
        names = without_effect(self, CHAT) + self.nested_without_effect()
        if any(getattr(message, "name", None) is not None for message in self.messages):
            names.append("messages[].name")
        contents = [getattr(message, "content", None) for message in self.messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if any(isinstance(part, TextPart) and part.prompt_cache_breakpoint is not None for part in parts):
            names.append(_BREAKPOINT)
        return names

    def _max_tokens(self) -> tuple[int | None, str]:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise RequestError(
                f"'max_tokens' is {old} and 'max_completion_tokens' is {new}: they mean the same, send one",
                param="max_completion_tokens",
            )
        return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


_decoder = msgspec.json.Decoder(ChatRequest, strict=True)


def decode_chat(body: bytes) -> ChatRequest:
    """Return the body as a request of which every field is honoured or cannot change the answer.

    Raises RequestError, UnknownFieldError or UnsupportedFieldError, each naming the field.
    """
    request = decode(body, _decoder, CHAT)
    refuse_what_would_change_the_answer(request, CHAT)
    request.check_stream_options()
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("'top_logprobs' only goes with \"logprobs\": true: set it", param="top_logprobs")
    return request


def _normalised(message: Message, index: int) -> dict[str, Any]:
    """Return a message as templates know it: a role and a string."""
    place = f"messages[{index}]"
    if isinstance(message, ToolMessage | FunctionMessage):
        role = message.__struct_config__.tag
        raise UnsupportedFieldError(f"'{place}.role': messages of role {role} are not supported", param=f"{place}.role")
    if isinstance(message, AssistantMessage):
        return {"role": "assistant", "content": _assistant_content(message, place)}
    role = "user" if isinstance(message, UserMessage) else "system"
    return {"role": role, "content": _text(message.content, place)}


def _assistant_content(message: AssistantMessage, place: str) -> str:
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name) not in (None, []):
            param = f"{place}.{name}"
            raise UnsupportedFieldError(f"'{param}' is not supported: leave it out, or send null", param=param)
    if message.content is not None:
        return _text(message.content, place)
    if message.refusal is not None:
        return message.refusal
    raise RequestError(
        f"'{place}.content' is null or missing: an assistant's message without tool calls needs a string, or parts of "
        "type text",
        param=f"{place}.content",
    )


def _text(content: Content, place: str) -> str:
    if isinstance(content, str):
        return content
    if not content:
        raise RequestError(f"'{place}.content' is empty: send a string or at least one part", param=f"{place}.content")
    for index, part in enumerate(content):
        if not isinstance(part, TextPart):
            param = f"{place}.content[{index}].type"
            kind = part.__struct_config__.tag
            raise UnsupportedFieldError(f"'{param}' is {kind!r}: this model reads parts of type text only", param=param)
    return "\n".join(part.text for part in content if isinstance(part, TextPart))
