"""The request of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from app.errors import RequestError
from app.pool.request import ChatPrompt, GenerationRequest, ModelInfo, ToolUse
from app.server.schema.common import CommonRequest, Count, TopLogprobs
from app.server.schema.decode import decode
from app.server.schema.fields import CHAT, refuse_what_would_change_the_answer, without_effect
from app.server.schema.messages import (
    AssistantMessage,
    DeveloperMessage,
    Message,
    SystemMessage,
    TextPart,
    UserMessage,
    templated,
)
from app.server.schema.numbers import check_integers
from app.server.schema.structured import grammar_source
from app.server.schema.template_arguments import (
    ReasoningEffort,
    template_arguments,
    template_names_without_effect,
)
from app.server.schema.tools import ToolChoice, Tools, tool_use, tools_without_effect

MAX_MESSAGES = 4096
MAX_DOCUMENTS = 256
_BREAKPOINT = "messages[].content[].prompt_cache_breakpoint"


class ChatRequest(CommonRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body; what becomes of each field stands in `fields.CHAT`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    moderation: Any = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, Any]], Meta(max_length=MAX_DOCUMENTS)] | None = None
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
        tools = tool_use(self)
        return GenerationRequest(
            prompts=[self._prompt(tools)],
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
            tools=tools,
            reuse_prefix=self.cache_prompt is not False,
            timings_per_token=self.timings_per_token is True,
        )

    def _prompt(self, tools: ToolUse | None) -> ChatPrompt:
        continues = self.continue_final_message is True
        if continues and self.add_generation_prompt:
            raise RequestError(
                "'add_generation_prompt' begins a message, 'continue_final_message' goes on with the last: send one",
                param="add_generation_prompt",
            )
        if continues and not isinstance(self.messages[-1], AssistantMessage):
            raise RequestError(
                "'continue_final_message' goes on with an assistant's message, which the last of 'messages' is not",
                param="continue_final_message",
            )
        check_integers(self.documents, "documents")
        return ChatPrompt(
            templated(self.messages),
            tools=tools.tools if tools else [],
            documents=self.documents or [],
            template_arguments=template_arguments(self),
            add_generation_prompt=not continues if self.add_generation_prompt is None else self.add_generation_prompt,
            continue_final_message=continues,
        )

    def names_without_effect(self, model: ModelInfo | None = None) -> list[str]:
        """Return the names of the fields that were sent and cannot change the answer, of this model if it is given."""
        names = without_effect(self, CHAT) + self.nested_without_effect() + tools_without_effect(self)
        if model is not None:
            names += template_names_without_effect(self, model.template_variables)
        named = (SystemMessage, DeveloperMessage, UserMessage, AssistantMessage)
        if any(isinstance(message, named) and message.name is not None for message in self.messages):
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
