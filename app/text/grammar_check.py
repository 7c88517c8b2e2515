"""What clients want answers held to: bounded, turned into llguidance's terms, and tried, before any worker sees it.

This runs in the text child: a grammar that eats time or memory, or ends the process, ends with its request.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import msgspec

from app import guidance
from app.errors import GrammarRefusedError
from app.messages import ToolGrammar
from app.text.gbnf import is_gbnf, lark_from_gbnf
from app.text.tool_grammar import CallGrammars

if TYPE_CHECKING:
    from app.chat.formats import ToolForm
    from app.llama.vocab import Vocabulary
    from app.messages import CompileGrammar, Trigger

MAX_SOURCE_BYTES = 256 * 1024
MAX_DEPTH = 64  # of a schema's objects and arrays, and of a grammar's or pattern's brackets
MAX_PATTERNS = 256  # regular expressions in one schema
MAX_PATTERN_BYTES = 8 * 1024
MAX_CHOICES = 1024
_TRIED_TOKENS = 24

_OPENING, _CLOSING = "([{", ")]}"


class GrammarChecker:
    """Compiles grammars for one vocabulary and follows each a few tokens far."""

    def __init__(
        self, vocabulary: Vocabulary, tool_form: ToolForm = "generic", reasoning: tuple[str, str] | None = None
    ) -> None:
        """`tool_form` and `reasoning`: how the model's template has it write calls, and mark reasoning."""
        self._vocabulary = vocabulary
        self._calls = CallGrammars(tool_form, reasoning, vocabulary)

    @functools.cached_property
    def _tokenizer(self) -> guidance.GrammarTokenizer:
        return guidance.GrammarTokenizer(self._vocabulary)

    def compiled(self, asked: CompileGrammar) -> tuple[str, Trigger | None]:
        """Return the grammar as the worker takes it, and behind what it begins, None for at once.

        Raises GrammarRefusedError with the reason and the field.
        """
        try:
            _bound_bytes("it", asked.source, MAX_SOURCE_BYTES)
            if asked.kind == "tool_calls":
                return self._tool_calls(msgspec.json.decode(asked.source, type=ToolGrammar), asked.prompt_end)
            grammar = _TRANSLATE[asked.kind](asked.source)
            self._try(grammar)
        except GrammarRefusedError as error:
            message = f"'{asked.param}' cannot be followed: {error.message}"
            raise GrammarRefusedError(message, param=asked.param) from error
        return grammar, None

    def _tool_calls(self, asked: ToolGrammar, prompt_end: str) -> tuple[str, Trigger | None]:
        """Return the grammar of calls; an empty one when none is required and none can be had."""
        try:
            for schema in asked.schemas:
                _bound_schema(schema)
            calls = self._calls.grammar(asked, prompt_end)
            if calls is None:
                return "", None
            grammar = guidance.lark_grammar(calls.lark)
            self._try(grammar)
        except GrammarRefusedError:
            if asked.required or asked.otherwise is not None:
                raise
            return "", None  # calls are read without it
        return grammar, calls.trigger

    def _try(self, grammar: str) -> None:
        """Compile it and go a short way: what breaks at once shall not break in the middle of an answer."""
        constraint = guidance.Constraint(self._tokenizer, grammar)
        for step in range(_TRIED_TOKENS):
            constraint.compute()
            if constraint.error is not None:
                raise GrammarRefusedError(constraint.error)
            allowed = constraint.allowed.nonzero()[0]
            if not len(allowed):
                raise GrammarRefusedError("after a few tokens of an answer no token of this model may follow")
            token = int(allowed[step * 7919 % len(allowed)])
            if constraint.finished or token in self._vocabulary.eog:
                return
            constraint.accept(token)


def _json_schema(source: str) -> str:
    try:
        schema = msgspec.json.decode(source.encode("utf-8", "surrogatepass"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise GrammarRefusedError(f"the schema is not valid JSON: {error}") from error
    except RecursionError as error:
        raise GrammarRefusedError(f"the schema is nested more than {MAX_DEPTH} deep") from error
    if not isinstance(schema, dict):
        raise GrammarRefusedError("a schema is a JSON object")
    _bound_schema(schema)
    try:
        return guidance.json_schema_grammar(schema)
    except ValueError as error:
        raise GrammarRefusedError(str(error)) from error


def _bound_schema(schema: dict[str, Any]) -> None:
    """Raise GrammarRefusedError for a schema that is too deep, or has too many or too long patterns."""
    patterns = 0
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise GrammarRefusedError(f"the schema is nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            for pattern in _patterns_of(value):
                patterns += 1
                _bound_pattern(pattern)
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            waiting += [(inner, depth + 1) for inner in value]
    if patterns > MAX_PATTERNS:
        raise GrammarRefusedError(f"the schema has {patterns} patterns, the limit is {MAX_PATTERNS}")


def _patterns_of(value: dict[str, Any]) -> list[str]:
    named = value.get("patternProperties")
    single = value.get("pattern")
    return [*(named if isinstance(named, dict) else ()), *([single] if isinstance(single, str) else ())]


def _regex(source: str) -> str:
    _bound_pattern(source)
    return guidance.regex_grammar(source)


def _bound_pattern(pattern: str) -> None:
    _bound_bytes("a regular expression", pattern, MAX_PATTERN_BYTES)
    _bound_brackets(pattern)


def _bound_bytes(what: str, text: str, limit: int) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limit:
        raise GrammarRefusedError(f"{what} has {size} bytes, the limit is {limit}")


def _bound_brackets(text: str) -> None:
    """Raise GrammarRefusedError for deep nesting; brackets within strings count too, which errs on the safe side."""
    depth = 0
    for character in text:
        if character in _OPENING:
            depth += 1
            if depth > MAX_DEPTH:
                raise GrammarRefusedError(f"brackets are nested more than {MAX_DEPTH} deep")
        elif character in _CLOSING:
            depth = max(0, depth - 1)


def _choice(source: str) -> str:
    choices = msgspec.json.decode(source, type=list[str])
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise GrammarRefusedError(f"there are {len(choices)} choices: give 1 to {MAX_CHOICES}")
    if "" in choices:
        raise GrammarRefusedError("a choice is empty: no answer can be that")
    return guidance.choice_grammar(choices)


def _grammar(source: str) -> str:
    return guidance.lark_grammar(lark_from_gbnf(source) if is_gbnf(source) else source)


_TRANSLATE = {"json_schema": _json_schema, "regex": _regex, "choice": _choice, "grammar": _grammar}
