"""Grammars in the engine, with the real model: answers keep to them whatever else is asked, and nobody else notices."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from app.guidance import Constraint
from app.llama.context import Context
from app.llama.model import Model
from app.messages import Cancel, CompileGrammar, GrammarKind, Sampling
from app.text.grammar_check import GrammarChecker
from tests.engine.test_engine import Harness

HOT = Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=7)
LEVEL = {"type": "string", "enum": ["low", "hoch", "高い"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": LEVEL}, "required": ["b"]}, "c": {"const": "ü"}},
        "required": ["a", "c"],
        "additionalProperties": False,
    },
    "bounded array": {
        "type": "array",
        "items": {"type": "integer", "minimum": -5, "maximum": 5},
        "minItems": 2,
        "maxItems": 4,
    },
    "number": {"type": "number", "exclusiveMinimum": 0, "maximum": 9.5, "multipleOf": 0.25},
    "anyOf": {"anyOf": [LEVEL, {"type": "boolean"}, {"type": "array", "items": LEVEL, "maxItems": 2}]},
    "recursive $ref": {
        "$defs": {"n": {"type": "object", "properties": {"v": LEVEL, "n": {"$ref": "#/$defs/n"}}, "required": ["v"]}},
        "type": "array",
        "prefixItems": [{"$ref": "#/$defs/n"}, {"type": "null"}],
        "items": False,
        "minItems": 2,
    },
    "strings": {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$", "maxLength": 5},
            "word": {"type": "string", "minLength": 2, "maxLength": 6},
        },
        "required": ["day", "code", "word"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[Model]:
    with Model(default_model, device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def compiled(model: Model) -> Callable[[GrammarKind, str], str]:
    checker = GrammarChecker(model.vocabulary)
    return lambda kind, source: checker.compiled(CompileGrammar(1, kind, source, "x"))[0]


@pytest.fixture(scope="module")
def harness(model: Model) -> Iterator[Harness]:
    with Context(model, slots=3, context_length=512, batch_size=64, threads=1) as context:
        yield Harness(model, context)


@pytest.fixture(autouse=True)
def _forget(harness: Harness) -> None:
    harness.sent.clear()


def finish(harness: Harness, *requests: int) -> None:
    """Step until these have ended; the engine sleeps while a grammar is compiled and nothing else runs."""
    harness.finish(*requests, steps=2000)


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_keep_to_their_schema(harness: Harness, compiled: Callable[[GrammarKind, str], str], name: str) -> None:
    schema = SCHEMAS[name]
    grammar = compiled("json_schema", json.dumps(schema))
    for request, sampling in enumerate((Sampling(temperature=0), HOT, Sampling(seed=3, min_p=0.02)), 1):
        harness.submit(request, "As JSON:", 70 if "recursive" in name else 150, sampling, grammar=grammar)
    finish(harness, 1, 2, 3)
    ended = [request for request in (1, 2, 3) if harness.pieces(request)[-1].finish_reason == "stop"]
    for request in ended:
        jsonschema.Draft202012Validator(schema).validate(json.loads(harness.answer(request)))
    assert len(ended) >= (1 if "recursive" in name else 3), [harness.answer(request) for request in (1, 2, 3)]


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", r"\d{3}-\d{4}", r"\d{3}-\d{4}"),
        ("choice", '["yes", "no", "yes, always"]', r"yes|no|yes, always"),
        ("grammar", 'start: "<" ITEM ("," ITEM){2} ">"\nITEM: /[a-z]{1,5}/', r"<[a-z]{1,5}(,[a-z]{1,5}){2}>"),
        ("grammar", 'root ::= "(" root ")" | [a-c]{2} "é"', r"\(*[a-c]{2}é\)*"),
    ],
)
def test_answers_keep_to_other_grammars(
    harness: Harness, compiled: Callable[[GrammarKind, str], str], kind: GrammarKind, source: str, pattern: str
) -> None:
    last = harness.run(1, "Answer:", 60, Sampling(temperature=1.5, seed=11), grammar=compiled(kind, source))
    if last.finish_reason == "stop" or kind != "grammar":
        assert last.finish_reason == "stop"
        assert re.fullmatch(pattern, harness.answer(1)), harness.answer(1)


def test_bias_penalties_logprobs_and_ignore_eos_do_not_break_a_grammar(
    harness: Harness, model: Model, compiled: Callable[[GrammarKind, str], str]
) -> None:
    wrong = int(model.vocabulary.tokenize("maybe")[0])
    sampling = Sampling(temperature=0, logit_bias={wrong: 100.0}, repeat_penalty=1.5, presence_penalty=2.0)
    last = harness.run(
        1, "Yes or no?", 9, sampling, grammar=compiled("choice", '["yes","no"]'), ignore_eos=True, top_logprobs=2
    )
    assert harness.answer(1) in ("yes", "no")
    assert last.finish_reason == "stop"
    entries = [entry for piece in harness.pieces(1) for entry in piece.logprobs or []]
    assert b"".join(entry.text for entry in entries).decode() == harness.answer(1)
    assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in entries)


def test_ignore_eos_goes_on_as_long_as_the_grammar_lets_it(
    harness: Harness, compiled: Callable[[GrammarKind, str], str]
) -> None:
    grammar = compiled("regex", "(ab){1,6}")
    last = harness.run(1, "ab", 60, Sampling(temperature=0), grammar=grammar, ignore_eos=True)
    assert (harness.answer(1), last.finish_reason) == ("ab" * 6, "stop")


def test_stop_strings_and_max_tokens_cut_a_grammar_short(
    harness: Harness, compiled: Callable[[GrammarKind, str], str]
) -> None:
    grammar = compiled("choice", '["one two three four five"]')
    assert harness.run(1, "Count:", 40, grammar=grammar, stop=[" three"]).finish_reason == "stop"
    assert harness.answer(1) == "one two"
    assert harness.run(2, "Count:", 2, grammar=grammar).finish_reason == "length"
    assert "one two three four five".startswith(harness.answer(2))
    whole = harness.run(3, "Count:", 40, grammar=grammar)
    exact = harness.run(4, "Count:", whole.completion_tokens, grammar=grammar)
    assert (harness.answer(4), exact.finish_reason) == ("one two three four five", "stop")


def test_free_streams_say_the_same_beside_grammars(
    harness: Harness, compiled: Callable[[GrammarKind, str], str]
) -> None:
    harness.run(1, "Once upon a time", 20)
    grammar = compiled("json_schema", json.dumps(SCHEMAS["strings"]))
    harness.submit(2, "As JSON:", 40, HOT, grammar=grammar)
    harness.submit(3, "As JSON:", 40, HOT, grammar=grammar)
    harness.submit(4, "Once upon a time", 20)
    finish(harness, 2, 3, 4)
    assert harness.answer(4) == harness.answer(1)
    assert harness.answer(2) == harness.answer(3)  # the same seed


def test_a_request_cancelled_while_its_grammar_is_compiled_is_gone(
    harness: Harness, compiled: Callable[[GrammarKind, str], str]
) -> None:
    grammar = compiled("choice", '["yes"]')
    harness.submit(1, "Hello", 40)
    harness.engine.step()
    harness.submit(2, "Yes?", 9, grammar=grammar)
    harness.engine.submit(Cancel(2))
    finish(harness, 1, 2)
    assert harness.pieces(2)[-1].finish_reason == "cancelled"
    time.sleep(0.2)
    harness.submit(3, "Yes?", 9, grammar=grammar)
    finish(harness, 3)
    assert harness.answer(3) == "yes"
    assert len(harness.pieces(2)) == 1


def test_a_late_mask_holds_up_its_own_row_only(
    harness: Harness, compiled: Callable[[GrammarKind, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = compiled("json_schema", json.dumps(SCHEMAS["strings"]))
    harness.run(1, "As JSON:", 30, HOT, grammar=grammar)
    harness.run(2, "Once upon a time", 30)
    compute, calls, gate = Constraint.compute, [], threading.Event()

    def blocked(constraint: Constraint) -> None:
        calls.append(constraint)
        assert len(calls) <= 3 or gate.wait(60)
        compute(constraint)

    monkeypatch.setattr(Constraint, "compute", blocked)
    harness.submit(3, "As JSON:", 12, HOT, grammar=grammar)
    harness.submit(4, "Once upon a time", 30)
    while not harness.pieces(4) or not harness.pieces(4)[-1].finish_reason:
        harness.engine.step()
    assert len(harness.pieces(3)) == 3
    gate.set()
    finish(harness, 3)
    assert harness.answer(1).startswith(harness.answer(3))
    assert harness.answer(4) == harness.answer(2)


def test_a_grammar_that_breaks_fails_its_sequence_only(
    harness: Harness, compiled: Callable[[GrammarKind, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = compiled("json_schema", json.dumps(SCHEMAS["strings"]))
    compute, calls = Constraint.compute, []

    def breaking(constraint: Constraint) -> None:
        calls.append(constraint)
        if len(calls) > 4:
            raise RuntimeError("panicked")
        compute(constraint)

    monkeypatch.setattr(Constraint, "compute", breaking)
    harness.submit(1, "As JSON:", 60, grammar=grammar)
    harness.submit(2, "Once upon a time", 20)
    finish(harness, 1, 2)
    failed = harness.pieces(1)[-1]
    assert (failed.finish_reason, failed.error_name) == ("error", "GrammarRefusedError")
    assert "panicked" in (failed.error or "")
    assert harness.pieces(2)[-1].finish_reason == "length"
    harness.engine.check_integrity()


def test_what_the_worker_cannot_compile_is_an_error_of_that_request(harness: Harness) -> None:
    failed = harness.run(1, "Hello", 9, grammar="start: unknown")
    assert (failed.finish_reason, failed.error_name) == ("error", "GrammarRefusedError")
    assert "unknown" in (failed.error or "")
