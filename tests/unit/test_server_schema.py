"""Bodies become requests, or errors that name the field; every field of OpenAI's schema is on exactly one list."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import (
    chat_completion_assistant_message_param as assistant_params,
)
from openai.types.chat import (
    chat_completion_stream_options_param as stream_params,
)
from openai.types.chat import (
    completion_create_params as chat_params,
)

from app.errors import RequestError, UnknownFieldError, UnsupportedFieldError
from app.messages import Sampling
from app.pool.request import ChatPrompt, TextPrompt, TokenPrompt
from app.server.schema import docs, fields
from app.server.schema.chat import AssistantMessage, ChatRequest, decode_chat
from app.server.schema.common import StreamOptions
from app.server.schema.completions import CompletionRequest, decode_completion

USER = {"role": "user", "content": "Hi"}


def chat(**changes: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "messages": [USER], **changes})


def text(**changes: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "prompt": "Hi", **changes})


def keys(*params: Any) -> set[str]:
    return {key for param in params for key in typing.get_type_hints(param)}


class TestFieldLists:
    def test_every_chat_field_of_openai_is_on_a_list(self) -> None:
        theirs = keys(chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming)
        assert "messages" in theirs
        assert theirs - set(fields.CHAT) == set()

    def test_every_completion_field_of_openai_is_on_a_list(self) -> None:
        theirs = keys(text_params.CompletionCreateParamsNonStreaming, text_params.CompletionCreateParamsStreaming)
        assert "prompt" in theirs
        assert theirs - set(fields.COMPLETIONS) == set()

    def test_nested_fields_of_openai_are_known(self) -> None:
        assert keys(stream_params.ChatCompletionStreamOptionsParam) == set(StreamOptions.__struct_fields__)
        theirs = keys(assistant_params.ChatCompletionAssistantMessageParam) - {"role"}
        assert theirs - set(AssistantMessage.__struct_fields__) == set()

    @pytest.mark.parametrize(
        ("request_type", "table"), [(ChatRequest, fields.CHAT), (CompletionRequest, fields.COMPLETIONS)]
    )
    def test_the_lists_are_the_structs(self, request_type: type[msgspec.Struct], table: dict[str, Any]) -> None:
        assert set(request_type.__struct_fields__) == set(table)

    def test_the_page_does_not_drift(self) -> None:
        page = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
        assert docs.replace_tables(page) == page, "run: python scripts/write_api_docs.py"

    @pytest.mark.parametrize("name", [name for name, field in fields.CHAT.items() if field.use == "refused"])
    def test_refused_chat_fields(self, name: str) -> None:
        with pytest.raises(UnsupportedFieldError) as caught:
            decode_chat(chat(**{name: "anything else"}))
        assert caught.value.param == name
        for neutral in fields.CHAT[name].neutral:
            assert decode_chat(chat(**{name: neutral})).names_without_effect() == []

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("user", "u"),
            ("metadata", {"a": "b"}),
            ("prediction", {"type": "content", "content": "x"}),
            ("prompt_cache_key", "k"),
            ("prompt_cache_options", {"mode": "implicit"}),
            ("prompt_cache_retention", "24h"),
            ("safety_identifier", "s"),
            ("service_tier", "auto"),
            ("store", False),
        ],
    )
    def test_fields_without_effect_are_named(self, name: str, value: object) -> None:
        assert fields.CHAT[name].use == "no effect"
        assert decode_chat(chat(**{name: value})).names_without_effect() == [name]

    def test_nested_fields_without_effect_are_named(self) -> None:
        part = {"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}
        message = {"role": "user", "name": "Ada", "content": [part]}
        request = decode_chat(chat(messages=[message], stream=True, stream_options={"include_obfuscation": False}))
        assert request.names_without_effect() == [
            "stream_options.include_obfuscation",
            "messages[].name",
            "messages[].content[].prompt_cache_breakpoint",
        ]


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": "0.7"}, "temperature", "expected a number, got a string"),
    ({"temperature": True}, "temperature", "expected a number, got true or false"),
    ({"temperature": 2.1}, "temperature", "at most 2"),
    ({"temperature": -0.1}, "temperature", "at least 0"),
    ({"top_p": 0}, "top_p", "> 0"),
    ({"top_p": 1.01}, "top_p", "at most 1"),
    ({"top_k": -2}, "top_k", "at least -1"),
    ({"min_p": 1.5}, "min_p", "at most 1"),
    ({"presence_penalty": 2.5}, "presence_penalty", "at most 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "at least -2"),
    ({"repeat_penalty": 1e-300}, "repeat_penalty", "at least 0.01"),
    ({"repeat_last_n": 1.5}, "repeat_last_n", "expected an integer, got a number"),
    ({"repetition_penalty": 1.1, "repeat_penalty": 1.2}, "repetition_penalty", "send one"),
    ({"typical_p": 0}, "typical_p", "> 0"),
    ({"xtc_probability": 1.1}, "xtc_probability", "at most 1"),
    ({"xtc_threshold": -0.1}, "xtc_threshold", "at least 0"),
    ({"dry_multiplier": -1}, "dry_multiplier", "at least 0"),
    ({"dry_base": 0.5}, "dry_base", "at least 1"),
    ({"dry_allowed_length": -1}, "dry_allowed_length", "at least 0"),
    ({"dry_penalty_last_n": -2}, "dry_penalty_last_n", "at least -1"),
    ({"dry_sequence_breakers": ["a"] * 9}, "dry_sequence_breakers", "at most 8"),
    ({"dry_sequence_breakers": ["a", ""]}, "dry_sequence_breakers[1]", "0 bytes"),
    ({"dry_sequence_breakers": ["é" * 21]}, "dry_sequence_breakers[0]", "42 bytes"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "at most 5"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "at least 0"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "at most 64"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 9}, "n", "at most 8"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "send one"),
    ({"seed": 2**63}, "seed", "at most"),
    ({"stop": 3}, "stop", "expected a string or an array"),
    ({"stop": ""}, "stop", "0 bytes"),
    ({"stop": ["a", ""]}, "stop[1]", "0 bytes"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": "é" * 129}, "stop", "258 bytes"),
    ({"stop": ["a", 3]}, "stop[1]", "expected a string"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"٣": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "at most 100"),
    ({"logit_bias": {"1": "x"}}, "logit_bias", "expected a number"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "at most 300"),
    ({"logprobs": 3}, "logprobs", "expected true or false, got an integer"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"stream": "true"}, "stream", "expected true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use", "no field"),
    ({"model": ""}, "model", "length at least 1"),
    ({"model": None}, "model", "expected a string, got null"),
    ({"messages": []}, "messages", "length at least 1"),
    ({"messages": "Hi"}, "messages", "expected an array, got a string"),
    ({"messages": [{}]}, "messages[0].role", "missing"),
    ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1].role", "'robot'"),
    ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role", "expected a string"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "got null"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing"),
    ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type", "'smell'"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "null"),
    ({"messages": [{**USER, "colour": 1}]}, "messages[0].colour", "no field"),
    ({"max_token": 3}, "max_token", "did you mean 'max_tokens'"),
    ({"length_penalty": 1.1}, "length_penalty", "no field"),
]


@pytest.mark.parametrize(("changes", "param", "words"), BAD_CHATS, ids=[f"{case[1]}-{case[2]}" for case in BAD_CHATS])
def test_bad_chats_name_the_field(changes: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_chat(chat(**changes)).generation_request("r")
    assert caught.value.param == param
    assert words in caught.value.message
    assert param in caught.value.message
    assert isinstance(caught.value, UnknownFieldError) == ("no field" in caught.value.message)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]}, "messages[0].tool_calls[0].type"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "messages[0].content[0].type"),
    ],
)
def test_messages_that_are_not_read_yet(message: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        decode_chat(chat(messages=[message])).generation_request("r")
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b'{"model": ', "ends too early, at byte 10"),
        (b'{"user": "\\ud800"}', "half of a surrogate pair"),
        (b'{"model": "m",}', "byte 14"),
        (chat()[:-1] + b',"temperature":NaN}', "byte"),
        (chat()[:-1] + b',"temperature":Infinity}', "byte"),
        (chat()[:-1] + b',"temperature":1e400}', "Number out of range".lower()),
        (chat() + b"x", "byte"),
        (b"[1]", "JSON object"),
        (b'"x"', "JSON object"),
        (b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', "UTF-8"),
        (b'{"model":"m","messages":[{"role":"user","content":"\\ud800x"}]}', "not valid JSON"),
        (chat()[:-1] + b',"functions":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"),
        (b'{"messages":[{"role":"user","content":"x"}]}', "'model' is missing"),
        (b'{"model":"m"}', "'messages' is missing"),
    ],
)
def test_bodies_that_are_no_request(body: bytes, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_chat(body)
    assert words in caught.value.message.lower() or words in caught.value.message
    assert "`" not in caught.value.message


def test_errors_do_not_repeat_long_input() -> None:
    with pytest.raises(RequestError) as caught:
        decode_chat(chat(messages=[{"role": "x" * 100_000, "content": ""}]))
    assert caught.value.param == "messages[0].role"
    assert len(caught.value.message) < 500


class TestChat:
    def test_defaults_are_openais(self) -> None:
        request = decode_chat(chat()).generation_request("r")
        assert request.sampling == Sampling()
        assert (request.n, request.max_tokens, request.stop, request.top_logprobs) == (1, None, [], None)
        assert not request.ignore_eos

    def test_null_is_absent(self) -> None:
        nulls = {name: None for name in fields.CHAT if name not in ("model", "messages")}
        assert decode_chat(chat(**nulls)) == decode_chat(chat())

    def test_everything_honoured_arrives(self) -> None:
        request = decode_chat(
            chat(
                temperature=0,
                top_p=0.5,
                top_k=40,
                min_p=0.1,
                presence_penalty=1,
                frequency_penalty=-1,
                repeat_penalty=1.1,
                repeat_last_n=-1,
                typical_p=0.8,
                xtc_probability=0.5,
                xtc_threshold=0.2,
                dry_multiplier=0.7,
                dry_base=1.5,
                dry_allowed_length=3,
                dry_penalty_last_n=-1,
                dry_sequence_breakers=[".", "é"],
                logit_bias={"7": -100},
                seed=-5,
                stop="x",
                n=3,
                max_completion_tokens=9,
                logprobs=True,
                top_logprobs=4,
                ignore_eos=True,
                min_tokens=9,
                stop_token_ids=[0, 7],
            )
        ).generation_request("r")
        assert request.sampling == Sampling(
            0.0, 40, 0.5, 0.1, 1.1, -1, 1.0, -1.0, {7: -100.0}, -5, 0.8, 0.5, 0.2, 0.7, 1.5, 3, -1, (".", "é")
        )
        assert (request.n, request.max_tokens, request.max_tokens_param) == (3, 9, "max_completion_tokens")
        assert (request.stop, request.top_logprobs, request.ignore_eos) == (["x"], 4, True)
        assert (request.min_tokens, request.stop_tokens) == (9, [0, 7])

    def test_repetition_penalty_is_repeat_penalty_over_everything(self) -> None:
        sampling = decode_chat(chat(repetition_penalty=1.2)).sampling()
        assert (sampling.repeat_penalty, sampling.repeat_last_n) == (1.2, -1)
        sampling = decode_chat(chat(repetition_penalty=1.2, repeat_penalty=1.2, repeat_last_n=5)).sampling()
        assert (sampling.repeat_penalty, sampling.repeat_last_n) == (1.2, 5)

    def test_logprobs_without_alternatives(self) -> None:
        assert decode_chat(chat(logprobs=True)).generation_request("r").top_logprobs == 0
        assert decode_chat(chat(logprobs=False)).generation_request("r").top_logprobs is None

    def test_top_k_minus_one_is_off(self) -> None:
        assert decode_chat(chat(top_k=-1)).generation_request("r").sampling.top_k == 0

    def test_messages_are_normalised(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        echoed = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None}
        messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}, echoed]
        (prompt,) = decode_chat(chat(messages=messages)).generation_request("r").prompts
        assert isinstance(prompt, ChatPrompt)
        assert prompt.messages == [
            {"role": "system", "content": "d"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "c"},
        ]


class TestCompletions:
    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("a", [TextPrompt("a")]),
            ("", [TextPrompt("")]),
            (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
            ([1, 2], [TokenPrompt([1, 2])]),
            ([[1, 2], [3]], [TokenPrompt([1, 2]), TokenPrompt([3])]),
        ],
    )
    def test_prompt_shapes(self, prompt: object, expected: list[object]) -> None:
        assert decode_completion(text(prompt=prompt)).generation_request("r").prompts == expected

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"prompt": []}, "prompt"),
            ({"prompt": None}, "prompt"),
            ({"prompt": [1, "a"]}, "prompt[1]"),
            ({"prompt": [[1], []]}, "prompt[1]"),
            ({"prompt": [-1]}, "prompt[0]"),
            ({"prompt": [1.5]}, "prompt[0]"),
            ({"prompt": [True]}, "prompt[0]"),
            ({"prompt": [2**31]}, "prompt[0]"),
            ({"prompt": ["a"] * 129}, "prompt"),
            ({"logprobs": True}, "logprobs"),
            ({"logprobs": 21}, "logprobs"),
            ({"best_of": 1, "n": 2}, "best_of"),
            ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
            ({"best_of": 21}, "best_of"),
            ({"echo": 1}, "echo"),
            ({"suffix": 1}, "suffix"),
            ({"suffix": "x", "echo": True}, "echo"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 0, "echo": False}, "max_tokens"),
            ({"max_tokens": -1, "echo": True}, "max_tokens"),
            ({"messages": []}, "messages"),
        ],
    )
    def test_bad_completions_name_the_field(self, changes: dict[str, Any], param: str) -> None:
        with pytest.raises(RequestError) as caught:
            decode_completion(text(**changes)).generation_request("r")
        assert caught.value.param == param

    def test_max_tokens_defaults_to_16(self) -> None:
        assert decode_completion(text()).generation_request("r").max_tokens == 16
        assert decode_completion(text(max_tokens=None)).generation_request("r").max_tokens == 16

    def test_best_of_equal_to_n_is_nothing_special(self) -> None:
        assert decode_completion(text(best_of=2, n=2)).generation_request("r").n == 2

    def test_logprobs_zero_asks_for_the_drawn_tokens(self) -> None:
        assert decode_completion(text(logprobs=0)).generation_request("r").top_logprobs == 0
