"""Structured output through OpenAI's own client against a real server: every field, both routes, what is refused."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import openai
import pydantic
import pytest

MESSAGES: list[Any] = [{"role": "user", "content": "Describe Alice, 31, who likes tea. Answer in JSON."}]
LEVEL = {
    "type": "object",
    "properties": {"level": {"enum": ["low", "high"]}},
    "required": ["level"],
    "additionalProperties": False,  # else an answer may go on until max_tokens cuts it off
}


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=120)
    drink: Literal["tea", "coffee"]


def schema_format(schema: Any, **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def ask(client: openai.OpenAI, model: str, **options: Any) -> str:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, **{"max_tokens": 60, **options}
    )
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content or ""


def test_parse_gives_the_pydantic_model(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Person, max_tokens=120, temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_stream_of_several_choices_keeps_to_the_schema(client: openai.OpenAI, model: str) -> None:
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        response_format=schema_format(LEVEL, strict=True),
        n=3,
        seed=5,
        max_tokens=60,
        stream=True,
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert all(json.loads(text)["level"] in ("low", "high") for text in texts)


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"guided_regex": r"\d{3}-\d{4}"}, r"\d{3}-\d{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "age: " [0-9]{2}'}, r"age: \d\d"),
        ({"grammar": 'start: "age: " /[0-9]{2}/'}, r"age: \d\d"),
        ({"guided_json": {"enum": ["a", "b"]}}, '"[ab]"'),
        ({"guided_json": '{"enum": ["a", "b"]}'}, '"[ab]"'),
        ({"json_schema": {"enum": ["a", "b"]}}, '"[ab]"'),
        ({"structured_outputs": {"json": {"const": 1}}}, "1"),
        ({"structured_outputs": {"regex": "a{3}"}}, "aaa"),
        ({"structured_outputs": {"choice": ["c", "d"]}}, "[cd]"),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, "x"),
        ({"response_format": {"type": "json_object", "schema": {"const": "ü"}}}, '"ü"'),
        ({"grammar": "", "guided_regex": "b", "json_schema": None, "response_format": {"type": "text"}}, "b"),
    ],
)
def test_every_field_in_both_routes(client: openai.OpenAI, model: str, field: dict[str, Any], pattern: str) -> None:
    assert re.fullmatch(pattern, ask(client, model, extra_body=field))
    answer = client.completions.create(model=model, prompt="Q: ", max_tokens=60, seed=1, extra_body=field)
    assert re.fullmatch(pattern, answer.choices[0].text)


def test_json_object_begins_an_object(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=12, temperature=0
    )
    assert (answer.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"response_format": schema_format({"not": {}})}, "response_format.json_schema.schema", "not"),
        ({"response_format": schema_format([])}, "response_format.json_schema.schema", "JSON object"),
        ({"response_format": schema_format(None)}, "response_format.json_schema.schema", "null"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "yaml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": schema_format({}, strict="yes")}, "response_format.json_schema.strict", "true or false"),
        ({"extra_body": {"guided_regex": "(?=a)"}}, "guided_regex", "look-around"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice", "0 choices"),
        ({"extra_body": {"guided_json": "{"}}, "guided_json", "not valid JSON"),
        ({"extra_body": {"grammar": "nonsense"}}, "grammar", "Expected"),
        ({"extra_body": {"structured_outputs": {"yaml": 1}}}, "structured_outputs.yaml", "no field"),
        (
            {"response_format": {"type": "json_object"}, "extra_body": {"structured_outputs": {"regex": "a"}}},
            "structured_outputs.regex",
            "send one",
        ),
    ],
)
def test_what_cannot_be_followed_is_a_400_that_says_why(
    client: openai.OpenAI, model: str, options: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=5, **options)
    assert caught.value.param == param
    assert words in str(caught.value)
