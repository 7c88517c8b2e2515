"""Grammars of calls, followed at random: whatever they let through is read as calls that keep to their schemas."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from app.chat.answer_parser import AnswerParser
from app.chat.formats import ToolForm
from app.errors import GrammarRefusedError
from app.guidance import Constraint, GrammarTokenizer
from app.llama.model import VocabularyModel
from app.messages import CompileGrammar, ToolGrammar, Trigger
from app.text import tool_grammar
from app.text.grammar_check import GrammarChecker
from tests.unit.tool_transcripts import gathered

FORMS: list[ToolForm] = [
    "hermes", "qwen_xml", "llama", "mistral", "mistral_args", "gemma", "harmony", "phi", "granite", "lfm2", "generic",
]  # fmt: skip
PLACE = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
}
LEVEL = {"properties": {"level": {"enum": ["low", "high"]}}, "required": ["level"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "set_level", "parameters": LEVEL}},
]
SCHEMAS: dict[str, dict[str, Any]] = {"get_weather": PLACE, "set_level": LEVEL}
THINK = ("<think>", "</think>")


@pytest.fixture(scope="module")
def vocabulary_model(default_model: Path) -> Iterator[VocabularyModel]:
    with VocabularyModel(default_model) as model:
        yield model


@pytest.fixture(scope="module")
def tokenizer(vocabulary_model: VocabularyModel) -> GrammarTokenizer:
    return GrammarTokenizer(vocabulary_model.vocabulary)


def compile_calls(
    model: VocabularyModel, form: ToolForm, asked: ToolGrammar, prompt_end: str = "", reasoning: Any = None
) -> tuple[str, Trigger | None]:
    source = msgspec.json.encode(asked).decode()
    checker = GrammarChecker(model.vocabulary, form, reasoning)
    return checker.compiled(CompileGrammar(1, "tool_calls", source, "tools", prompt_end))


def walk(model: VocabularyModel, tokenizer: GrammarTokenizer, grammar: str, seed: int, start: str = "") -> list[str]:
    """Return the pieces of a random answer that the grammar lets through, behind `start`; ends where it may, soon."""
    chance, vocabulary = random.Random(seed), model.vocabulary
    constraint, pieces = Constraint(tokenizer, grammar), []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in vocabulary.tokenize(start).tolist():
        pieces.append(decoder.decode(vocabulary.pieces[token]))
        constraint.accept(token)
    for _ in range(400):
        constraint.compute()
        allowed = [int(token) for token in constraint.allowed.nonzero()[0]]
        assert allowed
        likely = [token for token in allowed if token not in vocabulary.eog]
        if len(likely) < len(allowed) and (not likely or chance.random() < 0.5):
            return pieces
        short = [token for token in likely if vocabulary.pieces[token] in (b'"', b"}", b"<", b"</", b">", b"a", b" ")]
        token = chance.choice(short if short and chance.random() < 0.5 else likely)
        pieces.append(decoder.decode(vocabulary.pieces[token] or vocabulary.token_text(token).encode()))
        constraint.accept(token)
        if constraint.finished:
            return pieces
    return pieces


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parallel", [False, True])
def test_required_calls_keep_to_their_schemas(
    vocabulary_model: VocabularyModel, tokenizer: GrammarTokenizer, form: ToolForm, parallel: bool
) -> None:
    grammar, trigger = compile_calls(vocabulary_model, form, ToolGrammar(TOOLS, True, parallel))
    assert trigger is None
    most = 0
    for seed in range(5):
        parser = AnswerParser(form, None, SCHEMAS, certain=True)
        start = "<|channel|>commentary" if form == "harmony" else ""  # else it thinks on and on
        pieces = walk(vocabulary_model, tokenizer, grammar, seed, start)
        answer = gathered([event for piece in pieces for event in parser.feed(piece)] + parser.close())
        assert answer.calls
        assert answer.content == ""
        most = max(most, len(answer.calls))
        for name, arguments in answer.calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert (most > 1) == (parallel and form != "harmony")


@pytest.mark.parametrize(
    ("form", "prompt_end", "reasoning", "thinks"),
    [
        ("hermes", "<think>\n", THINK, True),
        ("hermes", "assistant\n", THINK, None),
        ("hermes", "<think>\n\n</think>\n\n", THINK, False),
        ("harmony", "<|start|>assistant", None, None),
    ],
)
def test_reasoning_comes_first(
    vocabulary_model: VocabularyModel,
    tokenizer: GrammarTokenizer,
    form: ToolForm,
    prompt_end: str,
    reasoning: Any,
    thinks: bool | None,
) -> None:
    grammar, _ = compile_calls(vocabulary_model, form, ToolGrammar(TOOLS, True, False), prompt_end, reasoning)
    thought = {"hermes": "Hm <b>.</think>\n\n", "harmony": "Hm.<|end|><|start|>assistant"}[form]
    begin = {"hermes": "<think>", "harmony": "<|channel|>analysis<|message|>"}[form]
    call = {
        "hermes": '<tool_call>\n{"name": "set_level", "arguments": {"level": "low"}}\n</tool_call>',
        "harmony": '<|channel|>commentary to=functions.set_level <|constrain|>json<|message|>{"level": "low"}',
    }[form]
    accepted = {
        text: follows(vocabulary_model, tokenizer, grammar, text)
        for text in (call, thought + call, begin + thought + call)
    }
    assert (
        list(accepted.values())
        == {True: [False, True, True], None: [True, False, True], False: [True, False, False]}[thinks]
    )
    for text in (text for text, is_accepted in accepted.items() if is_accepted):
        parser = AnswerParser(form, reasoning, SCHEMAS, prompt_end=prompt_end, certain=True)
        answer = gathered(parser.feed(text) + parser.close())
        assert answer.calls == (("set_level", '{"level": "low"}'),)
        assert answer.content == ""


def follows(model: VocabularyModel, tokenizer: GrammarTokenizer, grammar: str, text: str) -> bool:
    """Whether the grammar lets a text through, up to an end."""
    constraint = Constraint(tokenizer, grammar)
    for token in model.vocabulary.tokenize(text):
        constraint.compute()
        if not constraint.allowed[token]:
            return False
        constraint.accept(int(token))
    constraint.compute()
    return constraint.finished or any(constraint.allowed[token] for token in model.vocabulary.eog)


@pytest.mark.parametrize("form", FORMS)
def test_unless_required_only_calls_that_begin_with_a_token_are_held_to_their_form(
    vocabulary_model: VocabularyModel, form: ToolForm
) -> None:
    """No mark is a token of this vocabulary: then calls are read without a grammar."""
    assert compile_calls(vocabulary_model, form, ToolGrammar(TOOLS, False, True)) == ("", None)


def test_a_grammar_begins_behind_its_mark(
    vocabulary_model: VocabularyModel, tokenizer: GrammarTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary's own control token stands for the mark of a model that has one."""
    monkeypatch.setattr("app.chat.tools.hermes.BEGIN", "<|im_start|>")
    monkeypatch.setitem(tool_grammar._TRIGGERS, "hermes", "<|im_start|>")
    monkeypatch.setitem(tool_grammar._BEGINS, "hermes", "<|im_start|>")
    grammar, trigger = compile_calls(vocabulary_model, "hermes", ToolGrammar(TOOLS, False, True))
    assert trigger == Trigger(1)
    _, thinking = compile_calls(
        vocabulary_model, "hermes", ToolGrammar(TOOLS, False, True), "<|im_end|>\n", ("<|im_end|>", "<|endoftext|>")
    )
    assert thinking == Trigger(1, (2, 0), begins_in_reasoning=True)
    assert compile_calls(vocabulary_model, "hermes", ToolGrammar(TOOLS, False, True), "", THINK) == ("", None)
    call = '\n{"name": "set_level", "arguments": {"level": "low"}}\n</tool_call>'
    assert follows(vocabulary_model, tokenizer, grammar, call)
    assert not follows(vocabulary_model, tokenizer, grammar, call.replace("low", "lot"))


def test_an_answer_may_be_json_instead(vocabulary_model: VocabularyModel, tokenizer: GrammarTokenizer) -> None:
    asked = ToolGrammar(TOOLS, False, True, '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}')
    grammar, _ = compile_calls(vocabulary_model, "generic", asked)
    assert follows(vocabulary_model, tokenizer, grammar, '{"a": 1}')
    assert follows(
        vocabulary_model, tokenizer, grammar, '{"tool_calls": [{"name": "set_level", "arguments": {"level": "low"}}]}'
    )
    assert not follows(vocabulary_model, tokenizer, grammar, '{"a": 2}')


def test_schemas_that_cannot_be_followed(vocabulary_model: VocabularyModel) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]
    with pytest.raises(GrammarRefusedError, match="'tools' cannot be followed"):
        compile_calls(vocabulary_model, "hermes", ToolGrammar(tools, True, True))
    assert compile_calls(vocabulary_model, "hermes", ToolGrammar(tools, False, True)) == ("", None)
