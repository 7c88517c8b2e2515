"""Grammars of tool calls, in the form that the model's template teaches, so that arguments keep to their schemas.

Forms whose arguments are no JSON (LFM2's, Gemma's, Qwen3-Coder's) get JSON here, which their parsers read as well.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from app.chat.tools import gemma, granite, harmony, hermes, lfm2, mistral, phi
from app.guidance import lark_json, lark_string
from app.messages import Trigger

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.chat.formats import ToolForm
    from app.llama.vocab import Vocabulary
    from app.messages import ToolGrammar

_MOST_CALLS = 16  # of one answer that a grammar holds to its form
_ANY_TEXT = "/(?s:.*)/"


class CallGrammar(NamedTuple):
    """Calls as Lark, and behind what it begins; None for the answer's beginning."""

    lark: str
    trigger: Trigger | None = None


class _Frame(NamedTuple):
    """How a form puts calls together: `begin` call `end`, or `begin` call `between` call ... `end`; all of it Lark."""

    begin: str
    between: str
    end: str
    call: Callable[[str, str], str]  # from a function's name and its arguments' rule


class CallGrammars:
    """Writes the grammars for one model's form and vocabulary."""

    def __init__(self, form: ToolForm, reasoning: tuple[str, str] | None, vocabulary: Vocabulary) -> None:
        self._form = form
        self._reasoning = reasoning
        self._vocabulary = vocabulary

    def grammar(self, asked: ToolGrammar, prompt_end: str) -> CallGrammar | None:
        """Return the grammar; None where a call need not be made and its beginning is no token of its own."""
        if asked.required:
            return CallGrammar(self._whole(asked, self._thoughts(prompt_end)))
        if asked.otherwise is not None:
            return CallGrammar(self._whole(asked, self._thoughts(prompt_end), json.loads(asked.otherwise)))
        trigger = self._trigger(prompt_end)
        return None if trigger is None else CallGrammar(self._rules(asked, self._calls(asked, begun=True)), trigger)

    def _trigger(self, prompt_end: str) -> Trigger | None:
        """Return what begins a call; None where that, or what marks reasoning, is no token of its own."""
        mark = _TRIGGERS.get(self._form)
        token = None if mark is None else self._token(mark)
        if token is None or self._reasoning is None:
            return None if token is None else Trigger(token)
        begin, end = (self._token(mark.strip()) for mark in self._reasoning)
        if begin is None or end is None:
            return None
        return Trigger(token, (begin, end), prompt_end.rstrip().endswith(self._reasoning[0].strip()))

    def _whole(self, asked: ToolGrammar, thoughts: str, otherwise: dict[str, Any] | None = None) -> str:
        calls = self._calls(asked, begun=False)
        if otherwise is None:
            return self._rules(asked, f"{thoughts} {calls}")
        answer = f'{self._mark(harmony.CHANNEL)} "final" {self._mark(harmony.MESSAGE)} answer'
        answer = answer if self._form == "harmony" else "answer"
        return (
            self._rules(asked, f"{thoughts} (calls | {answer})") + f"calls: {calls}\nanswer: {lark_json(otherwise)}\n"
        )

    def _rules(self, asked: ToolGrammar, start: str) -> str:
        frame = self._frame()
        functions = [tool["function"] for tool in asked.tools]
        lines = [f"start: {start}", "call: " + " | ".join(f"call_{number}" for number in range(len(functions)))]
        for number, function in enumerate(functions):
            lines.append(f"call_{number}: {frame.call(function['name'], f'arguments_{number}')}")
            lines.append(f"arguments_{number}: {lark_json({'type': 'object', **function['parameters']})}")
        end = harmony.END if self._form == "harmony" else self._reasoning[1].strip() if self._reasoning else ""
        if end and not self._is_control(end):
            lines.append(f"thought[suffix={lark_string(end)}]: {_ANY_TEXT}")
        return "\n".join(lines) + "\n"

    def _calls(self, asked: ToolGrammar, *, begun: bool) -> str:
        """Return the rule's body of one call or several; `begun`: behind the mark that begins the first."""
        frame = self._frame()
        further = f" ({frame.between} call){{0,{_MOST_CALLS - 1}}}" if asked.parallel and frame.between else ""
        begin = f"{self._mark(_BEGINS[self._form])} " if self._form in _BEGINS and not begun else ""
        return f"{begin}{frame.begin} call{further} {frame.end}"

    def _frame(self) -> _Frame:
        mark, form = self._mark, self._form
        if form in ("hermes", "qwen_xml"):
            end = f'"\\n" {mark(hermes.END)}'
            return _Frame('"\\n"', f'{end} "\\n" {mark(hermes.BEGIN)} "\\n"', end, _named_object("arguments"))
        if form == "llama":
            return _Frame("", '"; "', "", _named_object("parameters"))
        if form == "mistral_args":
            return _Frame("", mark(mistral.BEGIN), "", self._name_and_arguments(mistral.ARGUMENTS))
        if form == "gemma":
            end = mark(gemma.END)
            return _Frame('"call:"', f'{end} {mark(gemma.BEGIN)} "call:"', end, self._name_and_arguments(""))
        if form == "harmony":
            return _Frame(f'{mark(harmony.CHANNEL)} "commentary to=functions."', "", "", self._harmony_call)
        if form == "generic":
            return _Frame('"{" "\\"tool_calls\\"" ":" " " "["', '", "', '"]" "}"', _named_object("arguments"))
        closing = {"phi": phi.END, "lfm2": lfm2.END}.get(form, "")
        return _Frame('"["', '", "', f'"]" {mark(closing)}' if closing else '"]"', _named_object("arguments"))

    def _name_and_arguments(self, between: str) -> Callable[[str, str], str]:
        mark = self._mark(between) if between else ""
        return lambda name, arguments: f"{lark_string(name)} {mark} {arguments}"

    def _harmony_call(self, name: str, arguments: str) -> str:
        constrain, message = self._mark(harmony.CONSTRAIN), self._mark(harmony.MESSAGE)
        return f'{lark_string(name + " ")} {constrain} "json" {message} {arguments}'

    def _thoughts(self, prompt_end: str) -> str:
        """Return what may come before the calls: reasoning, which the prompt may have begun, or ended already."""
        if self._form == "harmony":
            begin = f'{self._mark(harmony.CHANNEL)} "analysis" {self._mark(harmony.MESSAGE)}'
            return f'({begin} {self._up_to(harmony.END)} {self._mark(harmony.START)} "assistant")?'
        if self._reasoning is None:
            return ""
        begin, end = (mark.strip() for mark in self._reasoning)
        prompt_end = prompt_end.rstrip()
        if prompt_end.endswith(end):
            return ""
        thoughts = f"{self._up_to(end)} /\\s*/"
        return thoughts if prompt_end.endswith(begin) else f"({self._mark(begin)} {thoughts})?"

    def _up_to(self, end: str) -> str:
        """Return Lark for any text up to a mark, which is a control token, or else text: the rule `thought`."""
        return f"{_ANY_TEXT} {self._mark(end)}" if self._is_control(end) else "thought"

    def _mark(self, text: str) -> str:
        """Return a mark as Lark: the control tokens in it as such, the rest as text."""
        vocabulary = self._vocabulary
        tokens = vocabulary.tokenize(text, parse_special=True).tolist()
        if all(vocabulary.pieces[token] for token in tokens):
            return lark_string(text)
        return " ".join(
            lark_string(vocabulary.pieces[token].decode()) if vocabulary.pieces[token] else f"<[{token}]>"
            for token in tokens
        )

    def _is_control(self, text: str) -> bool:
        token = self._token(text)
        return token is not None and not self._vocabulary.pieces[token]

    def _token(self, text: str) -> int | None:
        tokens = self._vocabulary.tokenize(text, parse_special=True)
        return int(tokens[0]) if len(tokens) == 1 else None


# What begins calls where a model writes them as JSON; elsewhere they are read without a grammar, unless required.
_TRIGGERS: dict[ToolForm, str] = {
    "hermes": hermes.BEGIN,
    "granite": granite.BEGIN,
    "phi": phi.BEGIN,
    "mistral": mistral.BEGIN,
    "mistral_args": mistral.BEGIN,
}
_BEGINS = _TRIGGERS | {"qwen_xml": hermes.BEGIN, "lfm2": lfm2.BEGIN, "gemma": gemma.BEGIN}


def _named_object(key: str) -> Callable[[str, str], str]:
    """Return what writes a call as an object; cut as JSON is, because a grammar of JSON may stand beside it."""

    def call(name: str, arguments: str) -> str:
        quoted = lark_string(json.dumps(name))
        return f'"{{" "\\"name\\"" ":" " " {quoted} "," " " "\\"{key}\\"" ":" " " {arguments} "}}"'

    return call
