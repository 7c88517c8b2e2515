"""Chat answers in which reasoning and calls of tools are told from content, streamed and whole.

Only for models that reason, and for requests with tools: other answers are sent as they come.
"""

from __future__ import annotations

import secrets
import string
from typing import TYPE_CHECKING, Any

import msgspec

from app.chat.answer_parser import AnswerParser
from app.chat.events import CallBegin, Event, Reasoning, Text, joined
from app.server import sse
from app.server.schema.responses import chat_logprobs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from app.chat.formats import ToolForm
    from app.messages import Piece
    from app.pool.generation import Generation, Update
    from app.pool.request import GenerationRequest, ModelInfo
    from app.server.schema.responses import Identity

_ID_CHARACTERS = string.ascii_letters + string.digits
_MISTRAL_ID_LENGTH = 9  # which its templates insist on
_ID_LENGTH = 24

_encode = msgspec.json.encode


class Reading(msgspec.Struct, frozen=True):
    """How a request's answers are to be read."""

    form: ToolForm
    reasoning: tuple[str, str] | None
    schemas: dict[str, dict[str, Any]] | None  # of the tools that may be called
    parallel: bool
    starts_anew: bool  # whatever the prompt ends with: a grammar holds the answer to content

    def parser(self, generation: Generation) -> AnswerParser:
        """Return a parser for one choice of a generation that the pool has opened."""
        return AnswerParser(
            self.form,
            self.reasoning,
            self.schemas,
            prompt_end="" if self.starts_anew else generation.prompt_end,
            certain=generation.has_certain_calls,
            parallel=self.parallel,
        )

    def call_id(self) -> str:
        """Return a new id of a call."""
        if self.form in ("mistral", "mistral_args"):
            return _random_id(_MISTRAL_ID_LENGTH)
        return f"call_{_random_id(_ID_LENGTH)}"


def reading_of(model: ModelInfo, asked: GenerationRequest) -> Reading | None:
    """Return how to read the answers; None when they are content and nothing else."""
    tools = asked.tools
    if tools is None and model.reasoning_marks is None and model.tool_form != "harmony":
        return None
    return Reading(
        form=model.tool_form,
        reasoning=model.reasoning_marks,
        schemas=None if tools is None else tools.schemas,
        parallel=tools is None or tools.parallel,
        starts_anew=tools is None and asked.grammar is not None,
    )


def message(reading: Reading, generation: Generation, piece: Piece) -> tuple[dict[str, Any], str | None]:
    """Return a whole choice's message and its finish reason."""
    parser = reading.parser(generation)
    content = reasoning = ""
    calls: list[dict[str, Any]] = []
    for event in joined(parser.feed(piece.text) + parser.close()):
        if isinstance(event, Text):
            content += event.text
        elif isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, CallBegin):
            calls.append(
                {"id": reading.call_id(), "type": "function", "function": {"name": event.name, "arguments": ""}}
            )
        else:
            calls[-1]["function"]["arguments"] += event.text
    found: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:
        found["reasoning_content"] = reasoning
    if calls:
        found |= {"content": content or None, "tool_calls": calls}
    return found, _finish_reason(piece.finish_reason, parser)


class ParsedChatChunks(sse.ChatChunks):
    """The events of one chat answer whose text is read on its way."""

    def __init__(self, identity: Identity, choices: int, reading: Reading, *, include_usage: bool) -> None:
        super().__init__(identity, choices, include_usage=include_usage)
        self._choices = choices
        self._reading = reading
        self._parsers: list[AnswerParser] = []
        self._calls = [-1] * choices  # the index of each choice's latest call

    def opened(self, generation: Generation) -> None:
        """Take notice of how the prompt ends, and whether calls are held to their form."""
        self._parsers = [self._reading.parser(generation) for _ in range(self._choices)]

    def encode(self, updates: Iterable[Update]) -> bytes:
        """Return the events of everything that is decided now; perhaps none."""
        return b"".join(part for update in updates for part in self._events(update.index, update.piece))

    def _events(self, index: int, piece: Piece) -> Iterable[bytes]:
        parser = self._parsers[index]
        events = parser.feed(piece.text)
        if piece.finish_reason is not None:
            events = joined(events + parser.close())
        logprobs = b"null" if piece.logprobs is None else _encode(chat_logprobs(piece.logprobs))
        deltas = [self._delta(index, event) for event in events]
        if piece.logprobs and not deltas:
            deltas = [b"{}"]
        for delta in deltas:
            yield b'%s"delta":%s,"logprobs":%s,"finish_reason":null}%s' % (
                self._starts[index],
                delta,
                logprobs,
                self._tail,
            )
            logprobs = b"null"
        if piece.finish_reason is not None:
            yield self.last(index, _finish_reason(piece.finish_reason, parser) or "")

    def _delta(self, index: int, event: Event) -> bytes:
        if isinstance(event, Text):
            return b'{"content":%s}' % _encode(event.text)
        if isinstance(event, Reasoning):
            return b'{"reasoning_content":%s}' % _encode(event.text)
        call: dict[str, Any]
        if isinstance(event, CallBegin):
            self._calls[index] += 1
            call = {
                "id": self._reading.call_id(),
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
        else:
            call = {"function": {"arguments": event.text}}
        return _encode({"tool_calls": [{"index": self._calls[index], **call}]})


def _finish_reason(reason: str | None, parser: AnswerParser) -> str | None:
    return "tool_calls" if parser.calls and reason == "stop" else reason


def _random_id(length: int) -> str:
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(length))
