"""What clients may tell a model's chat template: switches by name, and how much to reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from app.chat.formats import TEMPLATE_ARGUMENTS
from app.errors import RequestError
from app.server.schema.numbers import check_integers

if TYPE_CHECKING:
    from collections.abc import Collection

    from app.server.schema.chat import ChatRequest

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

_LONGEST_TEXT = 256  # characters
_MOST_ITEMS = 64
_EFFORT = "reasoning_effort"
_EFFORT_VARIABLES = (_EFFORT, "enable_thinking", "thinking")


def template_arguments(request: ChatRequest) -> dict[str, Any]:
    """Return the template's variables. Raises RequestError naming one that is not allowed, or contradicts another."""
    given = request.chat_template_kwargs or {}
    for name, value in given.items():
        param = f"chat_template_kwargs.{name[:64]}"
        check_integers(value, param)
        if name not in TEMPLATE_ARGUMENTS:
            allowed = ", ".join(sorted(TEMPLATE_ARGUMENTS))
            raise RequestError(f"'{param}' cannot be set; what can be is {allowed}", param=param)
        if not _is_plain(value):
            raise RequestError(
                f"'{param}' takes true or false, a number, a string of at most {_LONGEST_TEXT} characters, or an array "
                f"of at most {_MOST_ITEMS} such strings",
                param=param,
            )
    effort = request.reasoning_effort
    if effort is None:
        return given
    if given.get(_EFFORT, effort) != effort:
        raise RequestError(
            f"'{_EFFORT}' is {effort!r} and 'chat_template_kwargs.{_EFFORT}' is {given[_EFFORT]!r}: send one of them",
            param=_EFFORT,
        )
    thinks = effort != "none"
    return {_EFFORT: effort, "enable_thinking": thinks, "thinking": thinks, **given}


def template_names_without_effect(request: ChatRequest, variables: Collection[str]) -> list[str]:
    """Return the names of what was sent and the model's template, which looks at these variables, does not look at."""
    given = request.chat_template_kwargs or {}
    names = [f"chat_template_kwargs.{name}" for name in given if name not in variables]
    if request.reasoning_effort is not None and not any(name in variables for name in _EFFORT_VARIABLES):
        names.insert(0, _EFFORT)
    return names


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= _MOST_ITEMS and all(isinstance(item, str) and _is_plain(item) for item in value)
    return (
        value is None
        or isinstance(value, bool | int | float)
        or (isinstance(value, str) and len(value) <= _LONGEST_TEXT)
    )
