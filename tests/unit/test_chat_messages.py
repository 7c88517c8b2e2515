"""Messages on their way to templates that can read more, or less."""

from __future__ import annotations

from typing import Any

import pytest

from app.chat.formats import reasoning_marks, tool_form
from app.errors import TemplateRefusedError
from app.messages import RenderChat
from app.text.chat_renderer import ChatRenderer
from app.text.template import ChatTemplate

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m['content'] + '' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content or [] %}[{{ p.text }}]{% endfor %}{% endif %}"
)
PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
CALLS = (
    "{% for t in tools or [] %}({{ t | tojson }}){% endfor %}{% for m in messages %}<{{ m.role }}>" + CONTENT +
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.id }}:{{ c.function.name }}:ARGUMENTS</tool_call>{% endfor %}"
    "{% if m.role == 'tool' %}={{ m.name }}:{{ m.tool_call_id }}{% endif %}{% endfor %}"
)  # fmt: skip
OBJECTS = CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
STRINGS = CALLS.replace("ARGUMENTS", "{{ 'A' + c.function.arguments }}")
USER = {"role": "user", "content": "Hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":"ü"}'}}
ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "21"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def render(source: str, messages: list[dict[str, Any]], **more: Any) -> str:
    return ChatRenderer(ChatTemplate(source, "tiny", {})).text(RenderChat(1, messages, **more))


def test_text_is_a_string_or_parts_as_the_template_reads_it() -> None:
    two: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert render(PLAIN, [two, USER]) == "<user>a\nb<user>Hi<assistant>"
    assert render(PARTS, [two, USER]) == "<user>[a][b]<user>[Hi]"
    assert render(OBJECTS, [two, USER]) == "<user>[a][b]<user>Hi"


def test_calls_and_results_as_the_template_wants_them() -> None:
    messages = [USER, ASSISTANT, RESULT]
    assert render(OBJECTS, messages) == '<user>Hi<assistant><tool_call>call_1:f:{"a": "ü"}</tool_call><tool>21=f:call_1'
    assert render(STRINGS, messages) == '<user>Hi<assistant><tool_call>call_1:f:A{"a":"ü"}</tool_call><tool>21=f:call_1'


def test_arguments_that_are_no_json_are_refused_only_where_an_object_is_needed() -> None:
    broken = {**ASSISTANT, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a'}}]}
    with pytest.raises(TemplateRefusedError) as caught:
        render(OBJECTS, [USER, broken, RESULT])
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"
    assert 'A{"a' in render(STRINGS, [USER, broken, RESULT])


def test_a_template_without_tools_is_told_of_them_in_the_system_message() -> None:
    for messages in ([USER], [{"role": "system", "content": "Be brief."}, USER]):
        text = render(PLAIN, messages, tools=[TOOL])
        assert text.startswith("<system>")
        assert '{"name": "f", "parameters": {"type": "object"}}' in text
        assert '{"tool_calls": [' in text
        assert text.endswith("<user>Hi<assistant>")
    assert "<system>Be brief.\n\n" in text


def test_calls_that_a_template_does_not_show_are_written_out() -> None:
    text = render(PLAIN, [USER, {**ASSISTANT, "content": "So:"}, RESULT])
    assert text.startswith('<user>Hi<assistant>So:\n{"tool_calls": [{"name": "f", "arguments": {"a": "ü"}}]}')
    assert text.endswith("<tool>21<assistant>")
    strict = PLAIN.replace("<{{", "{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}<{{")
    assert render(strict, [USER, ASSISTANT, RESULT]).endswith("<user>Result of f:\n21<assistant>")


def test_mistrals_ids_have_nine_characters() -> None:
    source = OBJECTS + "{# [TOOL_CALLS] #}"
    text = render(source, [USER, ASSISTANT, RESULT])
    first, second = text.partition("<tool_call>")[2][:9], text[-9:]
    assert first == second
    assert first.isalnum()
    assert "call_1" not in text
    nine = {**ASSISTANT, "tool_calls": [{**CALL, "id": "abcdefgh1"}]}
    assert "abcdefgh1" in render(source, [USER, nine, {**RESULT, "tool_call_id": "abcdefgh1"}])


def test_gpt_oss_gets_one_call_a_message_and_its_reasoning() -> None:
    source = OBJECTS.replace("<tool_call>", "{{ m.thinking }}<|channel|><|message|>")
    calls = {**ASSISTANT, "tool_calls": [CALL, {**CALL, "id": "call_2"}], "reasoning_content": "Hm."}
    text = render(source, [USER, calls, {**RESULT, "tool_call_id": "call_2", "content": "2"}, RESULT])
    shown = ["Hm.", "call_1:f", "<tool>21=f:call_1", "<assistant>", "call_2:f", "<tool>2=f:call_2"]
    places = [text.index(part, text.index("Hm.") if part == "<assistant>" else 0) for part in shown]
    assert places == sorted(places)


def test_reasoning_efforts_of_gpt_oss() -> None:
    source = OBJECTS + "{{ reasoning_effort }}{# <|channel|><|message|> #}"
    assert render(source, [USER], template_arguments={"reasoning_effort": "minimal"}).endswith("low")
    assert render(source, [USER], template_arguments={"reasoning_effort": "medium"}).endswith("medium")
    with pytest.raises(TemplateRefusedError, match="always reasons") as caught:
        render(source, [USER], template_arguments={"reasoning_effort": "none"})
    assert caught.value.param == "reasoning_effort"


def test_an_unfinished_message_ends_the_prompt() -> None:
    begun = [USER, {"role": "assistant", "content": "Once "}]
    more = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(PLAIN, begun, **more) == "<user>Hi<assistant>Once "
    assert render(PLAIN.replace("+ ''", "| trim") + "</s>", begun, **more) == "<user>Hi<assistant>Once"
    with pytest.raises(TemplateRefusedError) as caught:
        render("{{ messages[0].content }}", begun, **more)
    assert caught.value.param == "continue_final_message"


def test_documents_and_forms_that_are_not_read_are_refused() -> None:
    assert render("{{ documents[0].text }}", [USER], documents=[{"text": "x"}]) == "x"
    with pytest.raises(TemplateRefusedError) as caught:
        render(PLAIN, [USER], documents=[{"text": "x"}])
    assert caught.value.param == "documents"
    with pytest.raises(TemplateRefusedError, match="not read here") as caught:
        render("{{ tools }}", [USER], tools=[TOOL])
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("<tool_call></tool_call>", "hermes"),
        ("<tool_call>\n<function=x><parameter=y></tool_call>", "qwen_xml"),
        ("<tool_call>{name}<arg_key></tool_call>", "unknown"),
        ("[TOOL_CALLS]", "mistral"),
        ("[TOOL_CALLS]x[ARGS]", "mistral_args"),
        ("<|channel|>final<|message|>", "harmony"),
        ("<|tool_call|>", "granite"),
        ("<|tool_call|><|/tool_call|>", "phi"),
        ("<|tool_list_start|>", "lfm2"),
        ("<|tool_call>call:", "gemma"),
        ('<|start_header_id|>ipython "parameters"', "llama"),
        ("", "unknown"),
    ],
)
def test_forms_are_told_by_their_marks(template: str, form: str) -> None:
    assert tool_form(template, lists_tools=True) == form
    assert tool_form(template, lists_tools=False) == "generic"


def test_marks_of_reasoning() -> None:
    assert reasoning_marks("...split('</think>')... <think>") == ("<think>", "</think>")
    assert reasoning_marks("[THINK]x[/THINK]") == ("[THINK]", "[/THINK]")
    assert reasoning_marks("<|channel>thought ... <channel|>") == ("<|channel>thought\n", "<channel|>")
    assert reasoning_marks("no </think> alone") is None
