"""Renders a chat template for the proof, with the variables that such templates expect."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from typing import Any, NoReturn

_SYSTEM = {"role": "system", "content": "You are terse. Größe: 3½ m; naïve \U0001f999"}
_TALK = (
    {"role": "user", "content": "Hello, what's 12345 + 678?\n\n\tfor i in x: pass  "},
    {"role": "assistant", "content": "It's 13023.\n- a\n- b"},
    {"role": "user", "content": " Спасибо! 谢谢 "},
)


def render_samples(template: str, tokens: Mapping[str, str]) -> tuple[list[str], str | None]:
    """Return what the template makes of a few talks; if it makes nothing of any, why.

    `tokens` are the special tokens as variables, such as `bos_token`.
    """
    import jinja2  # noqa: PLC0415 - takes a while, and not every model has a template
    import jinja2.ext  # noqa: PLC0415
    import jinja2.sandbox  # noqa: PLC0415

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: dt.date(2026, 1, 1).strftime(layout)
    rendered: list[str] = []
    reason: str | None = None
    try:
        compiled = environment.from_string(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    except Exception as error:  # Jinja's own, and all that Python says of the code that Jinja makes of it
        return [], f"does not compile: {error}"
    for messages in ([_SYSTEM, *_TALK], list(_TALK), [_TALK[0]]):
        variables: dict[str, Any] = {"tools": None, "documents": None, **tokens, "messages": messages}
        try:
            rendered.append(compiled.render(variables, add_generation_prompt=True))
        except Exception as error:  # a template is a program of the model's author: it can raise anything
            reason = f"refuses every sample: {error}"
    return rendered, None if rendered else reason


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
