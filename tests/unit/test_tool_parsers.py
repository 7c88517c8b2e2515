"""Calls, reasoning and content in what models of each family write."""

from __future__ import annotations

import json

import pytest

from app.chat.answer_parser import AnswerParser, shown_marks
from app.chat.events import CallArguments, CallBegin
from app.chat.readers import Call
from app.chat.tools.lfm2 import python_calls
from tests.unit.tool_transcripts import KOELN, SCHEMAS, TRANSCRIPTS, TWO, Answer, Transcript, gathered, read


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda transcript: f"{transcript.form}: {transcript.text[:40]}")
def test_transcripts(transcript: Transcript) -> None:
    assert read(transcript, [transcript.text]) == transcript.answer
    assert read(transcript, list(transcript.text)) == transcript.answer


@pytest.mark.parametrize(
    "transcript", [t for t in TRANSCRIPTS if t.answer.calls], ids=lambda t: f"{t.form}: {t.text[:40]}"
)
def test_arguments_are_objects_and_certain_calls_the_same(transcript: Transcript) -> None:
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in transcript.answer.calls)
    assert read(transcript, list(transcript.text), certain=True) == transcript.answer


def test_certain_arguments_come_in_pieces() -> None:
    parser = AnswerParser("hermes", None, SCHEMAS, certain=True)
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Kö'
    assert parser.feed(text) == [CallBegin("get_weather"), CallArguments('{"place": "Kö')]
    assert parser.feed('ln"') == [CallArguments('ln"')]
    assert parser.feed("}}\n</tool_") == [CallArguments("}")]
    assert parser.feed("call>") == parser.close() == []


def test_a_certain_call_that_is_cut_off_stays_as_far_as_it_came() -> None:
    transcript = Transcript("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"pl', Answer())
    assert read(transcript, [transcript.text], certain=True) == Answer(calls=(("get_weather", '{"pl'),))
    assert read(transcript, [transcript.text]) == Answer(transcript.text)


def test_without_parallel_calls_the_first_one_is_all() -> None:
    transcript = Transcript("mistral", f"Yes.[TOOL_CALLS]{TWO} and more", Answer())
    assert read(transcript, [transcript.text], parallel=False) == Answer("Yes.", (KOELN,))


def test_without_tools_nothing_is_a_call() -> None:
    parser = AnswerParser("hermes", ("<think>", "</think>"), None)
    text = "<tool_call>{}</tool_call>"
    assert gathered(parser.feed(f"<think>a</think>{text}") + parser.close()) == Answer(text, reasoning="a")


def test_marks_that_may_be_control_tokens() -> None:
    assert shown_marks("mistral", ("[THINK]", "[/THINK]"))[:1] == ("[TOOL_CALLS]",)
    assert "[/THINK]" in shown_marks("mistral", ("[THINK]", "[/THINK]"))
    assert "<|channel|>" in shown_marks("harmony", None)
    assert shown_marks("unknown", None) == ()


def test_half_a_surrogate_in_a_call_is_no_call() -> None:
    assert python_calls('[f(a="\\ud800")]', {"f": {}}) is None
    assert python_calls('[f(a="\\u00e9")]', {"f": {}}) == [Call("f", '{"a": "\u00e9"}')]
