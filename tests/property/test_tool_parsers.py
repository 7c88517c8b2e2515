"""However an answer is cut into pieces, the same is read in it; damage makes content of calls, never an error."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.chat.formats import ToolForm
from tests.unit.tool_transcripts import SCHEMAS, TRANSCRIPTS, Transcript, read

FORMS: list[ToolForm] = sorted({transcript.form for transcript in TRANSCRIPTS})
WORDS = [
    *("<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_call>", "<tool_call|>", "call:now", '<|"|>', "functools"),
    *("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "analysis", "final", " to=functions.now", "```json", "```"),
    *("<think>", "</think>", '{"tool_calls": ', '{"name": "now", "arguments": ', "<function=now>", "</function>"),
    *("{", "}", "[", "]", "{}", "now(", ")", '"', "\\", ",", ";", ":", " ", "\n", "é", "a", "<", "<|", "`"),
]

cuts = st.lists(st.integers(0, 500), max_size=12)
transcripts = st.sampled_from(TRANSCRIPTS)
thoughts = st.sampled_from([None, ("<think>", "</think>")])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(max_size=6), json_values, max_size=4)


def split(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@given(transcripts, cuts, st.booleans())
def test_pieces_do_not_matter(transcript: Transcript, places: list[int], certain: bool) -> None:
    whole = read(transcript, [transcript.text], certain=certain)
    assert read(transcript, split(transcript.text, places), certain=certain) == whole


@given(transcripts, st.integers(0, 500), st.integers(0, 30), st.text(max_size=3), cuts)
def test_damaged_answers_are_read_the_same_too(
    transcript: Transcript, start: int, length: int, put: str, places: list[int]
) -> None:
    start %= len(transcript.text) + 1
    damaged = transcript._replace(text=transcript.text[:start] + put + transcript.text[start + length :])
    answer = read(damaged, [damaged.text])
    assert read(damaged, split(damaged.text, places)) == answer
    assert all(name in SCHEMAS and isinstance(json.loads(text), dict) for name, text in answer.calls)


@given(st.sampled_from(FORMS), st.lists(st.sampled_from(WORDS), max_size=14), thoughts, cuts, st.booleans())
def test_any_mixture_of_marks(form: ToolForm, words: list[str], thought: Any, places: list[int], certain: bool) -> None:
    transcript = Transcript(form, "".join(words), TRANSCRIPTS[0].answer, thought)
    answer = read(transcript, [transcript.text], certain=certain)
    assert read(transcript, split(transcript.text, places), certain=certain) == answer
    if not certain:
        assert all(isinstance(json.loads(text), dict) for _, text in answer.calls)


@given(arguments, cuts, st.booleans())
def test_json_arguments_come_through(value: dict[str, Any], places: list[int], certain: bool) -> None:
    for form, frame in (
        ("hermes", '<tool_call>\n{{"name": "now", "arguments": {}}}\n</tool_call>'),
        ("mistral", "[TOOL_CALLS]now[ARGS]{}"),
        ("llama", '{{"name": "now", "parameters": {}}}'),
        ("generic", '{{"tool_calls": [{{"name": "now", "arguments": {}}}]}}'),
        ("harmony", "<|channel|>commentary to=functions.now<|message|>{}"),
    ):
        written = json.dumps(value, ensure_ascii=False)
        if form == "harmony" and "<|" in written:
            continue  # control tokens cannot be written as text there
        text = frame.format(written)
        answer = read(Transcript(form, text, TRANSCRIPTS[0].answer), split(text, places), certain=certain)  # type: ignore[arg-type]
        assert answer.calls == (("now", written),)
        assert answer.content == ""
