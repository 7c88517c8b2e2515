"""What families of models write, through a real server: streamed and whole answers say the same, in OpenAI's types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from app.pool.request import ModelInfo
from tests.api.conftest import EdgeServer
from tests.unit.tool_transcripts import SCHEMAS, TRANSCRIPTS, Answer, Transcript

TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]


def ask(edge: EdgeServer, **changes: Any) -> bytes:
    body = {"model": "org/scripted", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, **changes}
    status, _, answer = edge.post("/v1/chat/completions", json.dumps(body).encode())
    assert status == 200, answer
    return answer


def chunks(answer: bytes) -> list[dict[str, Any]]:
    *events, done, rest = answer.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk)
    return found


def scripted(edge: EdgeServer, transcript: Transcript, pieces: list[str]) -> None:
    edge.pool.words = pieces
    model = ModelInfo(
        id="org/scripted", created=1, tool_form=transcript.form, reasoning_marks=transcript.reasoning, ready=True
    )
    edge.pool.model = lambda _: model  # type: ignore[method-assign]
    edge.pool.prompt_end = transcript.prompt_end


def streamed(found: list[dict[str, Any]]) -> tuple[Answer, str]:
    """Put a stream together as clients do; checks what each delta may have."""
    content = reasoning = ""
    calls: list[dict[str, Any]] = []
    reasons = []
    for chunk in found:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        content += delta.get("content") or ""
        reasoning += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"}
                assert call["function"]["arguments"] == ""
                calls.append({**call, "arguments": ""})
            else:
                assert call["index"] == len(calls) - 1
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                calls[-1]["arguments"] += call["function"]["arguments"]
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert len({call["id"] for call in calls}) == len(calls)
    (reason,) = reasons
    read = tuple((call["function"]["name"], call["arguments"]) for call in calls)
    return Answer(content, read, reasoning), reason


def test_every_transcript_streamed_and_whole(edge: EdgeServer) -> None:
    for transcript in TRANSCRIPTS:
        scripted(edge, transcript, [*transcript.text] or [""])
        answer, reason = streamed(chunks(ask(edge, stream=True)))
        assert answer == transcript.answer, transcript
        assert reason == ("tool_calls" if answer.calls else "stop")
        whole = ChatCompletion.model_validate_json(ask(edge))
        message = whole.choices[0].message
        calls = tuple((call.function.name, call.function.arguments) for call in message.tool_calls or [])
        assert calls == answer.calls
        assert message.content == (answer.content or (None if calls else ""))
        assert getattr(message, "reasoning_content", "") == answer.reasoning
        assert whole.choices[0].finish_reason == reason


def test_ids_are_what_mistral_takes(edge: EdgeServer) -> None:
    scripted(edge, TRANSCRIPTS[0]._replace(form="mistral"), ["[TOOL_CALLS]now[ARGS]{}"])
    (call,) = json.loads(ask(edge))["choices"][0]["message"]["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()


def test_without_tools_calls_are_content_and_reasoning_is_told_apart(edge: EdgeServer) -> None:
    text = '<tool_call>{"name": "now"}</tool_call>'
    scripted(edge, TRANSCRIPTS[0]._replace(reasoning=("<think>", "</think>")), ["<think>Hm", f".</think>{text}"])
    assert streamed(chunks(ask(edge, stream=True, tools=None)))[0] == Answer(text, (), "Hm.")


def test_logprobs_are_complete_although_text_is_held_back(edge: EdgeServer) -> None:
    scripted(edge, TRANSCRIPTS[0], ["<tool_call>", '{"name": "now", ', '"arguments": {}}', "</tool_call>"])
    found = chunks(ask(edge, stream=True, logprobs=True))
    tokens = [token["token"] for chunk in found for token in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert tokens == edge.pool.words
    assert streamed(found)[0].calls == (("now", "{}"),)


def test_a_length_that_runs_out_stays_the_reason(edge: EdgeServer) -> None:
    scripted(edge, TRANSCRIPTS[0], ['<tool_call>{"name": "now"}</tool_call>', "and"])
    edge.pool.finish_reason = "length"
    assert streamed(chunks(ask(edge, stream=True)))[1] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_only(edge: EdgeServer, stream: bool) -> None:
    two = '<tool_call>{"name": "now"}</tool_call>' * 2
    scripted(edge, TRANSCRIPTS[0], [two])
    answer = ask(edge, stream=stream, parallel_tool_calls=False)
    if stream:
        assert streamed(chunks(answer))[0].calls == (("now", "{}"),)
    else:
        assert len(json.loads(answer)["choices"][0]["message"]["tool_calls"]) == 1
