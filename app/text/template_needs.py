"""What a model's chat template can read, found out by trying: templates are programs and say it nowhere.

Tried once, with the first chat that asks, under that chat's deadline.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from app.errors import TemplateRefusedError

if TYPE_CHECKING:
    from app.text.template import ChatTemplate

_CALL_ID = "probe1234"  # nine letters and digits, which Mistral's templates insist on
_USER = {"role": "user", "content": "probe-question"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A key."}}},
    },
}
_OBJECT = {"probe_key": "probe-value"}
_STRING = '{"probe_key": "probe-value"}'
_RESULT = {"role": "tool", "tool_call_id": _CALL_ID, "name": "probe_tool", "content": "probe-result"}
_MISREAD = ("None", "{'probe_key'", '\\"probe_key')  # null or an object as Python's text, a string as JSON's


@dataclass(frozen=True)
class CallNeeds:
    """How a template wants an assistant's message with tool calls."""

    arguments: Literal["object", "string"]
    null_content: bool  # whether `content` is null rather than "" when there is no text


class TemplateNeeds:
    """What one template can read. Each answer is computed when it is first asked for."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    @property
    def lists_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return "tools" in self._template.variables

    @functools.cached_property
    def reads_strings(self) -> bool:
        """Whether `content` may be a string; a template that reads neither gets strings."""
        return "probe-question" in self._render([_USER]) or not self.reads_parts

    @functools.cached_property
    def reads_parts(self) -> bool:
        """Whether `content` may be a list of parts of type text."""
        parts = [{"type": "text", "text": "probe-one"}, {"type": "text", "text": "probe-two"}]
        text = self._render([{"role": "user", "content": parts}])
        return "probe-one" in text and "probe-two" in text and "'text'" not in text and '"text"' not in text

    @functools.cached_property
    def calls(self) -> CallNeeds | None:
        """How the template wants earlier tool calls; None when it does not show them, or not as they are."""
        before = self._render([_USER], [_TOOL])
        forms: tuple[tuple[Literal["object", "string"], Any], ...] = (("object", _OBJECT), ("string", _STRING))
        for (name, arguments), content in itertools.product(forms, (None, "")):
            text = self._render(_calling(arguments, content), [_TOOL])
            shown = all(text.count(word) > before.count(word) for word in ("probe_tool", "probe_key", "probe-value"))
            if shown and not any(text.count(word) > before.count(word) for word in _MISREAD):
                return CallNeeds(name, content is None)
        return None

    @functools.cached_property
    def shows_results(self) -> bool:
        """Whether the template shows messages of role tool."""
        answer = {"role": "assistant", "content": "probe-answer"}
        needs = self.calls
        after_text, after_call = [_USER, answer, _RESULT], _calling(_OBJECT, None)
        if needs is not None:
            after_call = _calling(
                _OBJECT if needs.arguments == "object" else _STRING, None if needs.null_content else ""
            )
        return any("probe-result" in self._render(messages, [_TOOL]) for messages in (after_call, after_text))

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        try:
            return self._template.render(messages, add_generation_prompt=True, arguments={}, tools=tools)
        except TemplateRefusedError:
            return ""


def _calling(arguments: Any, content: str | None) -> list[dict[str, Any]]:
    function = {"name": "probe_tool", "arguments": arguments}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    return [_USER, {"role": "assistant", "content": content, "tool_calls": [call]}, _RESULT]
