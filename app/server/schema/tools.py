"""Tools that a chat offers to the model, and which of them it may or must call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.errors import RequestError, UnsupportedFieldError
from app.pool.request import ToolUse
from app.server.schema.numbers import check_integers

if TYPE_CHECKING:
    from app.server.schema.chat import ChatRequest

MAX_TOOLS = 128

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+\Z")]


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call; `parameters` is a JSON schema of an object."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """A tool that is a function."""

    function: Function


class CustomTool(msgspec.Struct, frozen=True, tag_field="type", tag="custom"):
    """A tool that takes free text, or text of a grammar."""


Tool = FunctionTool | CustomTool
Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the tools."""

    name: Name


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """The tool that must be called, or one of those that may be."""

    function: NamedFunction


class CustomChoice(msgspec.Struct, frozen=True, tag_field="type", tag="custom"):
    """A custom tool that must be called."""


class AllowedTools(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Those of the tools that may be called now."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    """A choice among some of the tools."""

    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice | CustomChoice


def tool_use(request: ChatRequest) -> ToolUse | None:
    """Return what may or must be called; None when nothing may.

    Raises RequestError and UnsupportedFieldError naming the field: names that are there twice or not at all, a choice
    without tools, tools that are no functions.
    """
    tools = _functions(request.tools or [])
    choice = request.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("'tool_choice' asks for a call, but there are no 'tools'", param="tool_choice")
        return None
    if choice == "none":
        return None
    allowed, required = _chosen(choice, tools)
    return ToolUse(
        tools=[_templated(function) for name, function in tools.items() if name in allowed],
        required=required,
        parallel=request.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
    )


def tools_without_effect(request: ChatRequest) -> list[str]:
    """Return the names of fields about tools that were sent and cannot change the answer."""
    use = None if not request.tools or request.tool_choice == "none" else request.tools
    names = [] if use or not request.tools else ["tools"]
    if use is None and request.parallel_tool_calls is not None:
        names.append("parallel_tool_calls")
    if any(isinstance(tool, FunctionTool) and tool.function.strict is not None for tool in use or []):
        names.append("tools[].function.strict")
    return names


def _functions(tools: list[Tool]) -> dict[str, Function]:
    functions: dict[str, Function] = {}
    for index, tool in enumerate(tools):
        if isinstance(tool, CustomTool):
            param = f"tools[{index}].type"
            raise UnsupportedFieldError(f"'{param}' is 'custom': send tools of type function", param=param)
        name = tool.function.name
        if name in functions:
            param = f"tools[{index}].function.name"
            raise RequestError(f"'{param}' is {name!r}, which another tool has: names tell tools apart", param=param)
        _check_parameters(tool.function.parameters, f"tools[{index}].function.parameters")
        functions[name] = tool.function
    return functions


def _check_parameters(parameters: dict[str, Any] | None, param: str) -> None:
    if parameters is None:
        return
    check_integers(parameters, param)
    if parameters.get("type", "object") != "object":
        raise RequestError(
            f"'{param}.type' must be \"object\": a function's arguments have names", param=f"{param}.type"
        )


def _chosen(choice: ToolChoice | None, tools: dict[str, Function]) -> tuple[set[str], bool]:
    """Return the names that may be called, and whether one must be."""
    if isinstance(choice, CustomChoice):
        raise UnsupportedFieldError(
            "'tool_choice.type' is 'custom': there are functions only", param="tool_choice.type"
        )
    if isinstance(choice, NamedTool):
        return {_known(choice.function.name, tools, "tool_choice.function.name")}, True
    if isinstance(choice, AllowedChoice):
        allowed = choice.allowed_tools
        place = "tool_choice.allowed_tools.tools[{}].function.name".format
        names = {_known(tool.function.name, tools, place(index)) for index, tool in enumerate(allowed.tools)}
        return names, allowed.mode == "required"
    return set(tools), choice == "required"


def _known(name: str, tools: dict[str, Function], param: str) -> str:
    if name not in tools:
        raise RequestError(f"'{param}' is {name!r}, which is none of 'tools'", param=param)
    return name


def _templated(function: Function) -> dict[str, Any]:
    """Return a tool as templates show it."""
    description = {} if function.description is None else {"description": function.description}
    parameters = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
    return {"type": "function", "function": {"name": function.name, **description, "parameters": parameters}}
