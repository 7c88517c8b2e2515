"""What a chat with tools asks of the children: a prompt that shows them, a grammar of calls, and marks as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from app.chat.answer_parser import shown_marks
from app.errors import RequestError
from app.messages import RenderChat, ToolGrammar
from app.pool.request import ChatPrompt, GrammarSource

if TYPE_CHECKING:
    from app.pool.request import GenerationRequest, ModelInfo


def render_chat(number: int, prompt: ChatPrompt) -> RenderChat:
    """Return the frame that has the text child render a chat."""
    return RenderChat(
        number,
        prompt.messages,
        prompt.add_generation_prompt,
        prompt.template_arguments,
        prompt.tools,
        prompt.documents,
        prompt.continue_final_message,
    )


def grammar_asked(request: GenerationRequest) -> GrammarSource | None:
    """Return what the answer is to be held to: the client's own grammar, or one of calls, or either.

    Raises RequestError where calls and a grammar that is no JSON schema exclude each other.
    """
    use, own = request.tools, request.grammar
    if use is None:
        return own
    if own is not None and own.kind != "json_schema" and not use.required:
        raise RequestError(
            f"'{own.param}' holds the answer to a form that no call of 'tools' has: leave one of them out, or send "
            '"tool_choice": "none"',
            param=own.param,
        )
    otherwise = None if own is None or use.required else own
    source = ToolGrammar(use.tools, use.required, use.parallel, otherwise.source if otherwise else None)
    param = otherwise.param if otherwise else "tools"
    return GrammarSource("tool_calls", msgspec.json.encode(source).decode(), param)


def shown_tokens(request: GenerationRequest, model: ModelInfo) -> tuple[str, ...]:
    """Return the control tokens that the answer's text shows, for the parsers; none outside of chats."""
    if not isinstance(request.prompts[0], ChatPrompt):
        return ()
    is_read = request.tools is not None or model.tool_form == "harmony"
    return shown_marks(model.tool_form if is_read else "unknown", model.reasoning_marks)
