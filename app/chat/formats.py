"""Which form a model's chat template teaches: of tool calls and of reasoning."""

from __future__ import annotations

from typing import Literal

ToolForm = Literal[
    "hermes",
    "qwen_xml",
    "llama",
    "mistral",
    "mistral_args",
    "gemma",
    "harmony",
    "phi",
    "granite",
    "lfm2",
    "generic",
    "unknown",
]

# What clients may set in templates (`chat_template_kwargs`).
TEMPLATE_ARGUMENTS = frozenset(
    {
        "add_thoughts", "builtin_tools", "clear_thinking", "date_string", "enable_citations",
        "enable_thinking", "include_thinking", "keep_past_thinking", "model_identity", "preserve_thinking",
        "reasoning_effort", "reasoning_mode", "skip_thinking", "thinking", "thinking_budget", "thinking_effort",
        "thinking_mode", "tools_in_user_message", "truncate_history_thinking",
    }
)  # fmt: skip
KNOWN_TEMPLATE_VARIABLES = TEMPLATE_ARGUMENTS | {"documents", "tools"}

# What tells a form, the first that is found: all of the texts of a line are in the template.
_TOOL_SIGNS: tuple[tuple[ToolForm, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("gemma", ("<|tool_call>",)),
    ("gemma", ("<start_function_call>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("lfm2", ("<|tool_list_start|>",)),
    ("lfm2", ("List of tools: [", "<|im_start|>")),
    ("phi", ("<|/tool_call|>",)),
    ("phi", ("<|tool|>", "<|/tool|>")),
    ("phi", ("functools[",)),
    ("granite", ("<|tool_call|>",)),
    ("qwen_xml", ("<tool_call>", "<function=", "<parameter=")),
    ("llama", ("<|start_header_id|>", '"parameters"', "ipython")),
)
_HERMES_SIGN = "</tool_call>"
_OTHER_CALLS_IN_TOOL_CALL = ("<arg_key>", "<function=", "<invoke", "]<]", "<parameter")

# How reasoning begins and ends, by what is in the template.
_REASONING: tuple[tuple[str, str], ...] = (
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<think>", "</think>"),
)


def tool_form(template: str, *, lists_tools: bool) -> ToolForm:
    """Return how a model with this template writes calls.

    "generic" when the template shows no tools (`lists_tools`), so that we tell the model a form; "unknown" for forms
    that are not read here.
    """
    if not lists_tools:
        return "generic"
    for form, signs in _TOOL_SIGNS:
        if all(sign in template for sign in signs):
            return form
    if _HERMES_SIGN in template:
        return "unknown" if any(other in template for other in _OTHER_CALLS_IN_TOOL_CALL) else "hermes"
    return "unknown"


def reasoning_marks(template: str) -> tuple[str, str] | None:
    """Return what reasoning begins and ends with; None for models that don't mark it. Harmony's is not among these."""
    for begin, end in _REASONING:
        if end in template and begin.rstrip() in template:
            return begin, end
    return None
