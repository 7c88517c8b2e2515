"""From the messages of a chat to the text of its prompt: the model's own template, given what it can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.chat.formats import ToolForm, tool_form
from app.errors import TemplateRefusedError
from app.text.chat_messages import readable
from app.text.template_needs import TemplateNeeds

if TYPE_CHECKING:
    from app.messages import RenderChat
    from app.text.template import ChatTemplate

_EFFORT = "reasoning_effort"
_HARMONY_EFFORTS = {"minimal": "low", "xhigh": "high"}  # it knows low, medium and high


class ChatRenderer:
    """One model's template, and what is known of it."""

    def __init__(self, template: ChatTemplate) -> None:
        """Look at the template; nothing of it runs before the first chat."""
        self._template = template
        self._needs = TemplateNeeds(template)
        self.tool_form: ToolForm = tool_form(template.source, lists_tools=self._needs.lists_tools)

    def text(self, chat: RenderChat) -> str:
        """Return the text of the prompt. Raises TemplateRefusedError with the template's words, or naming a field."""
        if chat.documents and "documents" not in self._template.variables:
            raise TemplateRefusedError(
                "'documents': this model's chat template shows no documents; put their text into a message",
                param="documents",
            )
        if chat.tools and self.tool_form == "unknown":
            raise TemplateRefusedError(
                "'tools': this model's chat template writes calls in a form that is not read here; leave them out, or "
                "describe them in a message",
                param="tools",
            )
        if self._template.refusal is not None:
            messages = chat.messages
        else:
            messages = readable(chat.messages, chat.tools, self._needs, self.tool_form)
        return self._template.render(
            messages,
            add_generation_prompt=chat.add_generation_prompt,
            arguments=self._arguments(chat.template_arguments),
            tools=chat.tools,
            documents=chat.documents,
            continue_final_message=chat.continue_final_message,
        )

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        effort = given.get(_EFFORT)
        if self.tool_form != "harmony" or effort is None:
            return given
        if effort == "none":
            raise TemplateRefusedError(
                f"'{_EFFORT}' is 'none', but this model always reasons; send low, medium or high", param=_EFFORT
            )
        return {**given, _EFFORT: _HARMONY_EFFORTS.get(effort, effort)}
