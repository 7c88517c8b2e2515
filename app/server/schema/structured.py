"""What answers can be held to: OpenAI's `response_format`, and the fields of llama-server's and vLLM's clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from app.errors import RequestError
from app.pool.request import GrammarSource

if TYPE_CHECKING:
    from app.messages import GrammarKind
    from app.server.schema.common import CommonRequest

_ANY_OBJECT = '{"type": "object"}'

Schema = msgspec.Raw  # kept as it came: the text child reads it
NO_SCHEMA = Schema(b"null")


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object, or, as llama-server has it, one that a schema allows."""

    schema: Schema = NO_SCHEMA


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's wrapping of a schema. It is always enforced, with `strict` and without."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+\Z")]
    schema: Schema
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that a schema allows."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's one field for all kinds."""

    json: Schema = NO_SCHEMA
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


def grammar_source(request: CommonRequest) -> GrammarSource | None:
    """Return what the answer is to be held to; None for free text.

    Raises RequestError when two fields ask for something at once, or a schema is no JSON object.
    """
    found = [
        *_of_response_format(request.response_format),
        *_schema("json_schema", request.json_schema),
        *_text("grammar", "grammar", request.grammar),
        *_schema("guided_json", request.guided_json),
        *_text("guided_regex", "regex", request.guided_regex),
        *_choice("guided_choice", request.guided_choice),
        *_text("guided_grammar", "grammar", request.guided_grammar),
        *_of_structured_outputs(request.structured_outputs),
    ]
    if len(found) > 1:
        first, second = found[0].param, found[1].param
        raise RequestError(
            f"'{first}' and '{second}' both say what the answer has to be: send one of them", param=second
        )
    return found[0] if found else None


def _of_response_format(asked: ResponseFormat | None) -> list[GrammarSource]:
    if isinstance(asked, JsonSchemaFormat):
        given = _schema("response_format.json_schema.schema", asked.json_schema.schema)
        if not given:
            param = "response_format.json_schema.schema"
            raise RequestError(f"'{param}' is null: send a JSON schema, which is a JSON object", param=param)
        return given
    if isinstance(asked, JsonObjectFormat):
        given = _schema("response_format.schema", asked.schema)
        return given or [GrammarSource("json_schema", _ANY_OBJECT, "response_format")]
    return []


def _of_structured_outputs(asked: StructuredOutputs | None) -> list[GrammarSource]:
    if asked is None:
        return []
    return [
        *_schema("structured_outputs.json", asked.json),
        *([GrammarSource("json_schema", _ANY_OBJECT, "structured_outputs.json_object")] if asked.json_object else []),
        *_text("structured_outputs.regex", "regex", asked.regex),
        *_choice("structured_outputs.choice", asked.choice),
        *_text("structured_outputs.grammar", "grammar", asked.grammar),
    ]


def _schema(param: str, given: Schema) -> list[GrammarSource]:
    """Take a schema; vLLM's clients also send it as a string of JSON."""
    data = bytes(given).strip()
    if data == bytes(NO_SCHEMA):
        return []
    try:
        source = msgspec.json.decode(data, type=str) if data.startswith(b'"') else data.decode()
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise RequestError(f"'{param}' is not valid: {error}", param=param) from error
    if not source.lstrip().startswith("{"):
        raise RequestError(f"'{param}' is no JSON schema: that is a JSON object", param=param)
    return [GrammarSource("json_schema", source, param)]


def _text(param: str, kind: GrammarKind, given: str | None) -> list[GrammarSource]:
    return [GrammarSource(kind, given, param)] if given else []  # llama-server's clients send "" for none


def _choice(param: str, given: list[str] | None) -> list[GrammarSource]:
    return [] if given is None else [GrammarSource("choice", msgspec.json.encode(given).decode(), param)]
