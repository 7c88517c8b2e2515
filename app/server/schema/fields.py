"""What becomes of every field of a request: honoured, refused, or without effect. Nothing is ignored silently.

Error messages and `docs/api.md` are made from these tables; a test compares them with the `openai` package.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

import msgspec

from app.errors import UnsupportedFieldError

Use = Literal["honoured", "refused", "no effect"]


class Field(msgspec.Struct, frozen=True):
    """One field: its use, what it takes, and, when it is refused, the values that ask for nothing and so pass."""

    use: Use
    takes: str
    neutral: tuple[Any, ...] = ()


def _honoured(takes: str) -> Field:
    return Field("honoured", takes)


def _refused(takes: str, *neutral: object) -> Field:
    return Field("refused", takes, (None, *neutral))


def _no_effect(takes: str) -> Field:
    return Field("no effect", takes)


COMMON: dict[str, Field] = {
    "model": _honoured("the id of a served model, as GET /v1/models lists it"),
    "max_tokens": _honoured("an integer from 1; prompt and answer together must fit into a slot"),
    "temperature": _honoured("a number from 0 to 2, default 1; 0 takes the most probable token"),
    "top_p": _honoured("a number above 0, to 1; default 1"),
    "top_k": _honoured("an integer from -1 to 100000; 0 and -1 (default) keep all tokens"),
    "min_p": _honoured("a number from 0 to 1, default 0"),
    "presence_penalty": _honoured("a number from -2 to 2, default 0"),
    "frequency_penalty": _honoured("a number from -2 to 2, default 0"),
    "repeat_penalty": _honoured("a number from 0.01 to 10, default 1 (none)"),
    "repeat_last_n": _honoured(
        "an integer from -1 to 1000000, default 64: tokens that penalties look back on; -1: all"
    ),
    "repetition_penalty": _honoured("vLLM's name of repeat_penalty, and then repeat_last_n is -1 unless sent"),
    "typical_p": _honoured("a number above 0, to 1; default 1 (all): locally typical sampling"),
    "xtc_probability": _honoured("a number from 0 (default: never) to 1: how often XTC drops the top choices"),
    "xtc_threshold": _honoured("a number from 0 to 1, default 0.1: top choices are at least so probable"),
    "dry_multiplier": _honoured("a number from 0 (default: off) to 100: DRY's penalty on tokens that repeat"),
    "dry_base": _honoured("a number from 1 to 100, default 1.75: the penalty grows so much with each token"),
    "dry_allowed_length": _honoured("an integer from 0 to 1000000, default 2: tokens that may repeat for nothing"),
    "dry_penalty_last_n": _honoured(
        "an integer from -1 to 1000000, default 64: tokens that DRY looks back on; -1: all"
    ),
    "dry_sequence_breakers": _honoured(
        'an array of at most 8 strings of 1 to 40 bytes, default ["\\n", ":", "\\"", "*"]: no repetition across them'
    ),
    "logit_bias": _honoured("an object of at most 300 token ids (as strings) with a number from -100 to 100 each"),
    "seed": _honoured("an integer of 64 bits; the same draws from the same logits; see [determinism](determinism.md)"),
    "stop": _honoured("a string, or an array of at most 4; each of 1 to 256 bytes"),
    "n": _honoured("an integer from 1 to 8, default 1"),
    "stream": _honoured("true or false (default)"),
    "stream_options": _honoured('an object such as {"include_usage": true}, with "stream": true only'),
    "ignore_eos": _honoured("true or false (default): whether to go on after the model's end of text"),
    "cache_prompt": _honoured("true (default) or false: whether what the KV cache holds of the prompt is reused"),
    "timings_per_token": _honoured("true or false (default): `timings` as llama-server's in each chunk and answer"),
    "priority": _honoured("an integer from -1000 to 1000, default 0; of those that wait, the lowest comes first"),
    "min_tokens": _honoured("an integer from 0 (default): tokens before which no end of text is drawn; vLLM's"),
    "stop_token_ids": _honoured("an array of at most 64 token ids that end the answer as its own end does; vLLM's"),
    "response_format": _honoured(
        '{"type": "text"} (default), {"type": "json_object"} or {"type": "json_schema", "json_schema": {...}}'
    ),
    "json_schema": _honoured("a JSON schema, an object: the same as in response_format"),
    "grammar": _honoured("a grammar as a string: GBNF when a rule is written with ::=, else llguidance's Lark"),
    "guided_json": _honoured("a JSON schema, an object or the same as a string"),
    "guided_regex": _honoured("a regular expression that the whole answer matches"),
    "guided_choice": _honoured("an array of 1 to 1024 strings, one of which is the answer"),
    "guided_grammar": _honoured("the same as grammar"),
    "structured_outputs": _honoured("an object with one of json, json_object, regex, choice and grammar"),
    "user": _no_effect("a string"),
}

CHAT: dict[str, Field] = {
    "messages": _honoured("an array of 1 to 4096 messages"),
    **COMMON,
    "max_completion_tokens": _honoured("the same as max_tokens, of which it is the newer name"),
    "logprobs": _honoured("true or false (default)"),
    "top_logprobs": _honoured('an integer from 0 to 20, with "logprobs": true only'),
    "tools": _honoured("an array of at most 128 tools of type function"),
    "tool_choice": _honoured(
        '"none", "auto" (default), "required", {"type": "function", "function": {"name": ...}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}'
    ),
    "functions": _refused("null or [], and tools in its place", []),
    "function_call": _refused('null, "none" or "auto", and tool_choice in its place', "none", "auto"),
    "modalities": _refused('null or ["text"]', ["text"]),
    "audio": _refused("null"),
    "moderation": _refused("null"),
    "reasoning_effort": _honoured(
        '"none", "minimal", "low", "medium", "high" or "xhigh", if the model\'s template looks at it'
    ),
    "chat_template_kwargs": _honoured("an object of what the model's template looks at, as enable_thinking; vLLM's"),
    "add_generation_prompt": _honoured(
        "true (default) or false: whether the prompt begins the answer's message; vLLM's"
    ),
    "continue_final_message": _honoured(
        "true or false (default): whether the answer goes on with the last message, an assistant's; vLLM's"
    ),
    "documents": _honoured("an array of at most 256 objects, for models whose template shows them; vLLM's"),
    "verbosity": _refused('null or "medium"', "medium"),
    "web_search_options": _refused("null"),
    "metadata": _no_effect("an object"),
    "parallel_tool_calls": _honoured("true (default) or false: whether an answer may be several calls"),
    "prediction": _no_effect("an object"),
    "prompt_cache_key": _no_effect("a string"),
    "prompt_cache_options": _no_effect("an object"),
    "prompt_cache_retention": _no_effect("a string"),
    "safety_identifier": _no_effect("a string"),
    "service_tier": _no_effect("a string"),
    "store": _no_effect("true or false"),
}

COMPLETIONS: dict[str, Field] = {
    "prompt": _honoured(
        "a string, an array of strings, an array of token ids, or an array of such arrays; at most 128"
    ),
    **COMMON,
    "max_tokens": _honoured(
        "an integer from 1, default 16; prompt and answer together must fit into a slot; with echo also 0"
    ),
    "logprobs": _honoured("an integer from 0 to 20; with echo also of the prompt's tokens, the first being null"),
    "best_of": _honoured("an integer from n to 20: so many answers are made, the n most probable a token returned"),
    "echo": _honoured("true or false (default): the prompt comes before the answer, in text and logprobs"),
    "suffix": _honoured("a string that follows the answer, for models with tokens for filling in the middle"),
}

NESTED: dict[str, Field] = {
    "stream_options.include_usage": _honoured("true or false (default)"),
    "stream_options.include_obfuscation": _no_effect("true or false"),
    "response_format.schema": _honoured('a JSON schema, with {"type": "json_object"} only'),
    "response_format.json_schema.schema": _honoured("a JSON schema; it is enforced from the answer's first token on"),
    "response_format.json_schema.strict": _honoured("true or false; a schema is enforced in any case"),
    "response_format.json_schema.name": _no_effect("a string of at most 64 letters, digits, _ and -; required"),
    "response_format.json_schema.description": _no_effect("a string"),
    "structured_outputs.json": _honoured("as guided_json"),
    "structured_outputs.json_object": _honoured("true or false (default): any JSON object"),
    "structured_outputs.regex": _honoured("as guided_regex"),
    "structured_outputs.choice": _honoured("as guided_choice"),
    "structured_outputs.grammar": _honoured("as grammar"),
    "messages[].role": _honoured("system, developer (the same as system), user, assistant, tool or function"),
    "messages[].content": _honoured(
        "a string, or an array of parts of type text (joined by line feeds for most models)"
    ),
    "messages[].name": _no_effect("a string; of tool and function messages it is honoured"),
    "messages[].tool_calls": _honoured("an assistant's earlier calls, of type function"),
    "messages[].tool_call_id": _honoured("in messages of role tool: the id of the call whose result it is"),
    "messages[].function_call": _honoured("an assistant's earlier call in OpenAI's oldest way"),
    "messages[].reasoning_content": _honoured("an assistant's earlier reasoning, for models whose template shows it"),
    "tools[].function.name": _honoured("1 to 64 letters, digits, _ and -"),
    "tools[].function.description": _honoured("a string"),
    "tools[].function.parameters": _honoured("a JSON schema of an object"),
    "tools[].function.strict": _no_effect(
        "true or false: calls keep to their schema whenever a grammar holds them to it"
    ),
    "messages[].content[].prompt_cache_breakpoint": _no_effect("an object"),
}


def refuse_what_would_change_the_answer(request: msgspec.Struct, fields: dict[str, Field]) -> None:
    """Raise UnsupportedFieldError for a refused field that asks for something."""
    for name, field in fields.items():
        if field.use == "refused" and field.neutral:
            value = getattr(request, name)
            if not any(value == neutral and type(value) is type(neutral) for neutral in field.neutral):
                raise UnsupportedFieldError(
                    f"'{name}' is not supported here with this value: leave it out, or send {field.takes}", param=name
                )


def without_effect(request: msgspec.Struct, fields: dict[str, Field]) -> list[str]:
    """Return the names of the fields that were sent and cannot change the answer."""
    return [name for name, field in fields.items() if field.use == "no effect" and getattr(request, name) is not None]


def suggestion(name: str, fields: dict[str, Field]) -> str:
    """Return a sentence that names the field which was probably meant, or nothing."""
    near = difflib.get_close_matches(name, fields, 1, 0.75)
    return f"; did you mean '{near[0]}'?" if near else "; remove it"
