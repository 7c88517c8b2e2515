"""A model's own chat template: Jinja from the GGUF, in the immutable sandbox, with what such templates expect.

The sandbox stops access to Python; it stops neither time nor memory: that is the text child's deadline and limits.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.errors import TemplateRefusedError
from app.text.continuation import up_to_continuation_mark, with_continuation_mark

if TYPE_CHECKING:
    from jinja2.compiler import Frame
    from jinja2.parser import Parser

_PARAM = "messages"


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; for serving its content is all that counts."""

    tags = {"generation"}  # noqa: RUF012 - the base class wants a plain set

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        """Return the block's body as if the tags weren't there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _NoFolding(CodeGenerator):
    """Computes nothing while compiling: `{{ 'a' * 9999999999 }}` would eat the memory before any request comes."""

    def _output_child_to_const(self, node: jinja2.nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _NoFolding


class _RaisedByTemplate(jinja2.TemplateError):
    """The template called `raise_exception`."""


class ChatTemplate:
    """A compiled template with the model's special tokens as variables."""

    def __init__(self, source: str | None, model_name: str, special_tokens: dict[str, str]) -> None:
        """Compile once. A template that is absent or does not compile refuses when it is used."""
        self.refusal: str | None = None
        self.source = source or ""
        self.variables: frozenset[str] = frozenset()  # what it looks at and does not set itself
        self._variables = special_tokens
        if not source:
            self.refusal = (
                f"the model {model_name!r} has no chat template, so it cannot be given messages; "
                "send a plain prompt to /v1/completions"
            )
            return
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except Exception as error:  # Jinja's own, and all that Python says of the code that Jinja makes of it
            self.refusal = (
                f"the chat template of the model {model_name!r} does not compile ({_describe(error)}); "
                "send a plain prompt to /v1/completions"
            )

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        arguments: dict[str, Any],
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt text of these messages; it ends within the last of them with `continue_final_message`.

        Raises TemplateRefusedError with the template's own words when it refuses or fails.
        """
        if self.refusal is not None:
            raise TemplateRefusedError(self.refusal, param=_PARAM)
        if continue_final_message:
            messages = with_continuation_mark(messages)
        variables = {**self._variables, **arguments, "tools": tools or None, "documents": documents or None}
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._template.render(variables)
        except _RaisedByTemplate as error:
            raise TemplateRefusedError(f"the chat template refuses these messages: {error}", param=_PARAM) from error
        except MemoryError:
            raise
        except Exception as error:  # a template is a program of the model's author: it can raise anything
            raise TemplateRefusedError(
                f"the chat template fails on these messages: {_describe(error)}", param=_PARAM
            ) from error
        return up_to_continuation_mark(text) if continue_final_message else text


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # see _NoFolding
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which a model has never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _RaisedByTemplate(message)


def _strftime_now(layout: str) -> str:
    return dt.datetime.now().astimezone().strftime(layout)


def _describe(error: BaseException) -> str:
    line = getattr(error, "lineno", None)
    text = str(error) or type(error).__name__
    return f"line {line}: {text}" if line else text
