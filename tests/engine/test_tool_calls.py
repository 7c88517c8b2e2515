"""The real model under grammars of calls: what it draws is read as calls that keep to their schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from app.chat.answer_parser import AnswerParser
from app.chat.events import CallArguments
from app.chat.formats import ToolForm
from app.llama.context import Context
from app.llama.model import Model
from app.messages import CompileGrammar, Sampling, ToolGrammar
from app.text.grammar_check import GrammarChecker
from tests.engine.harness import Harness
from tests.unit.tool_transcripts import gathered

PLACE = {
    "type": "object",
    "properties": {"place": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["place", "days"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {"get_weather": PLACE, "now": {"type": "object", "additionalProperties": False}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]


@pytest.fixture(scope="module")
def harness(default_model: Path) -> Iterator[Harness]:
    with (
        Model(default_model, device="cpu") as model,
        Context(model, slots=3, context_length=256, batch_size=64, threads=1) as context,
    ):
        yield Harness(model, context)


@pytest.mark.parametrize("form", ["generic", "hermes", "mistral_args"])
def test_required_calls_are_valid_and_stream_in_pieces(harness: Harness, form: ToolForm) -> None:
    source = msgspec.json.encode(ToolGrammar(TOOLS, required=True, parallel=False)).decode()
    asked = CompileGrammar(1, "tool_calls", source, "tools")
    grammar, _ = GrammarChecker(harness.model.vocabulary, form).compiled(asked)
    harness.sent.clear()
    for request, sampling in enumerate((Sampling(temperature=0), Sampling(seed=1), Sampling(seed=2, temperature=2)), 1):
        harness.submit(request, "The weather in Paris:", 90, sampling, grammar=grammar)
    harness.finish(1, 2, 3, steps=2000)
    for request in (1, 2, 3):
        parser = AnswerParser(form, None, SCHEMAS, certain=True)
        events = [event for piece in harness.pieces(request) for event in parser.feed(piece.text)] + parser.close()
        answer = gathered(events)
        ((name, arguments),) = answer.calls
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        assert answer.content == ""
        assert harness.pieces(request)[-1].finish_reason == "stop"
        if name == "get_weather":
            assert sum(isinstance(event, CallArguments) for event in events) > 2
