"""Chat templates: what models' own Jinja may rely on, and what it must not reach."""

from __future__ import annotations

import datetime as dt

import pytest

from app.errors import TemplateRefusedError
from app.text.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Grüße <b>&</b>"}]


def render(source: str, messages: list[dict[str, object]] | None = None, **arguments: object) -> str:
    template = ChatTemplate(source, "tiny", {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(messages or MESSAGES, add_generation_prompt=True, arguments=arguments)


def test_special_tokens_and_generation_prompt_are_variables() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}GO{% endif %}"
    assert render(source) == "<s>Grüße <b>&</b></s>GO"


def test_blocks_are_trimmed_as_in_transformers() -> None:
    assert render("  {% for m in messages %}\n{{ m.role }}\n  {% endfor %}\nend") == "user\nend"


def test_loop_controls_are_there() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_json_is_neither_html_nor_ascii() -> None:
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "Grüße <b>&</b>"}'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": [\n  2\n ],\n "b": 1\n}'


def test_generation_blocks_leave_their_content() -> None:
    assert render("a{% generation %}{{ messages[0].role }}{% endgeneration %}z") == "auserz"


def test_absent_variables_are_none_or_empty() -> None:
    assert render("{{ tools is none }} {{ documents is none }} [{{ pad_token }}]") == "True True []"


def test_arguments_reach_the_template_but_do_not_replace_messages() -> None:
    assert render("{{ enable_thinking }} {{ messages | length }}", enable_thinking=False, messages=[]) == "False 1"


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(dt.datetime.now().astimezone().year)


def test_a_template_refuses_with_its_own_words() -> None:
    with pytest.raises(TemplateRefusedError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ messages[0].content.format.__globals__ }}x{{ lipsum.__globals__['os'] }}",
        "{% include '/etc/passwd' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(999999999) | list }}",
    ],
)
def test_what_fails_or_reaches_out_is_refused(source: str) -> None:
    with pytest.raises(TemplateRefusedError, match="fails on these messages") as caught:
        render(source)
    assert caught.value.param == "messages"


def test_a_template_that_does_not_compile_is_refused_when_used() -> None:
    template = ChatTemplate("{% for %}", "tiny", {})
    with pytest.raises(TemplateRefusedError, match=r"'tiny' does not compile \(line 1: .*/v1/completions"):
        template.render(MESSAGES, add_generation_prompt=True, arguments={})


@pytest.mark.parametrize("source", [None, ""])
def test_a_model_without_template_is_named(source: str | None) -> None:
    with pytest.raises(TemplateRefusedError, match=r"'tiny' has no chat template.*/v1/completions"):
        ChatTemplate(source, "tiny", {}).render(MESSAGES, add_generation_prompt=True, arguments={})


@pytest.mark.parametrize(
    "source", ["{{ 'a' * 10 ** 12 }}", "{{ 'a' | center(999999999999) }}", "{% set x = 'a' * 10 ** 12 %}"]
)
def test_compiling_computes_nothing(source: str) -> None:
    """Each would take a terabyte, and raise MemoryError, if constants were folded."""
    assert render("{% if false %}" + source + "{% endif %}fine") == "fine"
