"""From the bytes of a body to a checked struct, or to an error that names the field."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

import msgspec

from app.errors import RequestError, UnknownFieldError
from app.server.schema.fields import suggestion

if TYPE_CHECKING:
    from app.server.schema.fields import Field

Request = TypeVar("Request", bound=msgspec.Struct)

_LONGEST_QUOTE = 300  # characters of what the client sent that an error repeats
_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`$")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_INDEX = re.compile(r"\[[0-9]+\]")
_CODE = re.compile(r"`([^`]*)`")
_WORDS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def decode(body: bytes, decoder: msgspec.json.Decoder[Request], fields: dict[str, Field]) -> Request:
    """Return the body as the decoder's struct.

    Raises RequestError with the position (malformed JSON) or the field (wrong type, out of range, missing), and
    UnknownFieldError.
    """
    if not body.strip():
        raise RequestError("the body is empty: send a JSON object")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), fields) from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {_syntax_error(str(error), body)}") from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body is not valid UTF-8: {error.reason} 0x{error.object[error.start]:02x}; JSON is UTF-8"
        ) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply: send a flatter JSON object") from None


def _syntax_error(message: str, body: bytes) -> str:
    if "truncated" in message and body.rstrip().endswith(b"}") and _SURROGATE.search(body):
        return "half of a surrogate pair stands alone in a string"  # for which the decoder has no words of its own
    if "truncated" in message:
        return f"it ends too early, at byte {len(body)}"
    return message.removeprefix("JSON is malformed: ").replace("invalid escape", "an invalid escape")


def _field_error(message: str, fields: dict[str, Field]) -> RequestError:
    place = _PLACE.search(message)
    path = place[1].replace("[...]", "").lstrip(".") if place else ""
    what = message[: place.start()] if place else message
    if unknown := _UNKNOWN.search(what):
        name = unknown[1][:64]
        param = f"{path}.{name}" if path else name
        hint = "" if path else suggestion(name, fields)
        where = (*(_INDEX.sub("", path).split(".") if path else ()), unknown[1])
        return UnknownFieldError(f"there is no field '{param}'{hint or '; remove it'}", param=param, path=where)
    if missing := _MISSING.search(what):
        param = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"'{param}' is missing{_takes(param, fields)}", param=param)
    text = _plain(what if len(what) <= _LONGEST_QUOTE else what[:_LONGEST_QUOTE] + "…")
    if not path:
        return RequestError(f"the body must be a JSON object: {text}")
    return RequestError(f"'{path}': {text}{_takes(path, fields)}", param=path)


def _plain(message: str) -> str:
    """Return msgspec's words for JSON's: "Expected `float | null`, got `str`" is "expected a number, got a string"."""

    def words(match: re.Match[str]) -> str:
        kinds = [kind for kind in match[1].split(" | ") if kind != "null" or match[1] == "null"]
        return " or ".join(_WORDS.get(kind, kind) for kind in kinds)

    text = _CODE.sub(words, message).replace(" <= ", " of at most ").replace(" >= ", " of at least ")
    text = text.replace("of length of at least", "of length at least").replace(
        "of length of at most", "of length at most"
    )
    return text[:1].lower() + text[1:]


def _takes(path: str, fields: dict[str, Field]) -> str:
    field = fields.get(path.partition(".")[0].partition("[")[0])
    return f"; it takes {field.takes}" if field is not None and "." not in path else ""
