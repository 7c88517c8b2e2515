"""A chat whose last message is the beginning of the answer: the prompt ends where that message does."""

from __future__ import annotations

from typing import Any

from app.errors import TemplateRefusedError

# transformers' own mark, which some templates know and leave alone
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_PARAM = "continue_final_message"


def with_continuation_mark(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with a mark at the end of the last one's text; a list of parts has it in its last part.

    Raises TemplateRefusedError when the last message has no text.
    """
    last = messages[-1] if messages else {}
    content = last.get("content")
    if isinstance(content, str):
        marked: Any = content + _MARK
    elif isinstance(content, list) and content and "text" in content[-1]:
        marked = [*content[:-1], {**content[-1], "text": content[-1]["text"] + _MARK}]
    else:
        raise TemplateRefusedError(f"'{_PARAM}' needs a last message with text: there is none", param=_PARAM)
    return [*messages[:-1], {**last, "content": marked}]


def up_to_continuation_mark(text: str) -> str:
    """Return the rendered text before the mark, without white space there when the template trims it.

    Raises TemplateRefusedError when the template has dropped the mark.
    """
    place = text.rfind(_MARK.strip())
    if place < 0:
        raise TemplateRefusedError(
            f"'{_PARAM}': this model's chat template does not render the last message as it is", param=_PARAM
        )
    kept = text[:place]
    return kept if text.startswith(_MARK, place) else kept.rstrip()
