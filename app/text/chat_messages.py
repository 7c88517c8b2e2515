"""Messages as OpenAI's clients write them, turned into what a model's own chat template can read."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import msgspec

from app.chat.written import tool_instructions, written_calls
from app.errors import TemplateRefusedError

if TYPE_CHECKING:
    from app.chat.formats import ToolForm
    from app.text.template_needs import CallNeeds, TemplateNeeds

Messages = list[dict[str, Any]]

_MISTRAL_ID = re.compile(r"[A-Za-z0-9]{9}")
_MISTRAL_ID_LENGTH = 9


def readable(messages: Messages, tools: list[dict[str, Any]], needs: TemplateNeeds, form: ToolForm) -> Messages:
    """Return messages that the template shows to the model, tools included if it doesn't list them itself.

    Raises TemplateRefusedError for arguments of earlier calls that the template cannot take.
    """
    if tools and not needs.lists_tools:
        messages = _with_system_text(messages, tool_instructions(tools))
    if any("tool_calls" in message or message["role"] == "tool" for message in messages):
        messages = _with_readable_calls(messages, needs, form)
    if form == "harmony":
        messages = [_with_thinking(message) for message in _one_call_each(messages)]
    return [{**message, "content": _content(message["content"], needs)} for message in messages]


def _content(content: Any, needs: TemplateNeeds) -> Any:
    """Return text as a string or as parts, whichever the template reads; parts are joined by line feeds."""
    if isinstance(content, list):
        return content if needs.reads_parts else "\n".join(part["text"] for part in content)
    if isinstance(content, str) and not needs.reads_strings:
        return [{"type": "text", "text": content}]
    return content


def _with_system_text(messages: Messages, text: str) -> Messages:
    first, *others = messages
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    content = first["content"]
    given = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    return [{**first, "content": f"{given}\n\n{text}"}, *others]


def _with_readable_calls(messages: Messages, needs: TemplateNeeds, form: ToolForm) -> Messages:
    names: dict[str, str] = {}  # of the functions, by the calls' ids
    found: Messages = []
    for index, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            names |= {call["id"]: call["function"]["name"] for call in calls}
            found.append(_assistant(message, index, needs.calls, form))
        elif message["role"] == "tool":
            name = message.get("name") or names.get(message["tool_call_id"])
            result = {**message, "tool_call_id": _call_id(message["tool_call_id"], form)}
            result |= {"name": name} if name else {}
            found.append(result if needs.shows_results else _as_user(result))
        else:
            found.append(message)
    return found


def _assistant(message: dict[str, Any], index: int, needs: CallNeeds | None, form: ToolForm) -> dict[str, Any]:
    calls = [
        {**call, "id": _call_id(call["id"], form), "function": {**call["function"], "arguments": arguments}}
        for number, call in enumerate(message["tool_calls"])
        for arguments in [_arguments(call["function"]["arguments"], needs, index, number)]
    ]
    content = message["content"]
    if needs is not None:
        return {**message, "tool_calls": calls, "content": content or (None if needs.null_content else "")}
    written = written_calls(form, [call["function"] for call in calls])
    given = content if isinstance(content, str) else "\n".join(part["text"] for part in content or [])
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": f"{given}\n{written}" if given else written}


def _arguments(written: str, needs: CallNeeds | None, message: int, call: int) -> Any:
    """Return the arguments as the template wants them: read when it wants an object, else as they came."""
    if needs is not None and needs.arguments == "string":
        return written
    try:
        value = msgspec.json.decode(written.strip() or "{}")
    except (msgspec.DecodeError, RecursionError) as error:
        param = f"messages[{message}].tool_calls[{call}].function.arguments"
        raise TemplateRefusedError(
            f"'{param}' is not valid JSON, which this model's chat template needs: {error}", param=param
        ) from error
    return value


def _call_id(given: str, form: ToolForm) -> str:
    """Return an id that the template accepts: Mistral's refuse all but nine letters and digits."""
    if form not in ("mistral", "mistral_args") or _MISTRAL_ID.fullmatch(given):
        return given
    return hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()[:_MISTRAL_ID_LENGTH]


def _as_user(result: dict[str, Any]) -> dict[str, Any]:
    content = result["content"]
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    return {"role": "user", "content": f"Result of {result.get('name') or result['tool_call_id']}:\n{text}"}


def _one_call_each(messages: Messages) -> Messages:
    """Return messages of which each has at most one call, its result behind it: gpt-oss's template shows no second."""
    results = {message["tool_call_id"]: message for message in messages if message["role"] == "tool"}
    found: Messages = []
    moved: set[str] = set()
    for message in messages:
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            if message["role"] != "tool" or message["tool_call_id"] not in moved:
                found.append(message)
            continue
        for number, call in enumerate(calls):
            first = message if number == 0 else {"role": "assistant", "content": ""}
            found.append({**first, "tool_calls": [call]})
            if call["id"] in results:
                moved.add(call["id"])
                found.append(results[call["id"]])
    return found


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """Return an assistant's message with its reasoning where gpt-oss's template looks, which takes one of both."""
    reasoning = message.get("reasoning_content")
    if not reasoning or (message.get("tool_calls") and message["content"]):
        return message
    return {**message, "thinking": reasoning}
