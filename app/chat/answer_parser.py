"""One answer's text, told apart: reasoning, content and calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.chat.events import CallBegin, Event, Parser, Text, joined
from app.chat.reasoning import ReasoningSplitter
from app.chat.tools import gemma, generic, granite, harmony, hermes, lfm2, llama, mistral, phi, qwen_xml

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from app.chat.formats import ToolForm
    from app.chat.readers import Schemas

_MODULES: dict[str, ModuleType] = {
    "hermes": hermes,
    "qwen_xml": qwen_xml,
    "llama": llama,
    "mistral": mistral,
    "mistral_args": mistral,
    "gemma": gemma,
    "harmony": harmony,
    "phi": phi,
    "granite": granite,
    "lfm2": lfm2,
    "generic": generic,
}


def shown_marks(form: ToolForm, reasoning: tuple[str, str] | None) -> tuple[str, ...]:
    """Return the control tokens, as text, that an answer of this form must show for its parser to see them."""
    module = _MODULES.get(form)
    marks: tuple[str, ...] = module.MARKS if module is not None else ()
    return (*marks, *(mark.strip() for mark in reasoning or ()))


class AnswerParser:
    """Reads one answer in pieces: reasoning first, then what calls and what content is."""

    def __init__(
        self,
        form: ToolForm,
        reasoning: tuple[str, str] | None,
        schemas: Schemas | None,
        *,
        prompt_end: str = "",
        certain: bool = False,
        parallel: bool = True,
    ) -> None:
        """`schemas` are of the tools that may be called, None for none; `prompt_end` the last of the prompt's text.

        `certain`: a grammar holds calls to their form. Not `parallel`: what follows the first call is dropped.
        """
        self._reasoning = None if reasoning is None else ReasoningSplitter.behind(prompt_end, *reasoning)
        self._tools: Parser | None = None
        if schemas is not None or form == "harmony":
            new: Callable[..., Parser] = _MODULES[form].parser
            self._tools = new(schemas or {}, certain=certain)
        self._parallel = parallel
        self._over = False
        self.calls = 0

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is decided now."""
        if self._reasoning is None:
            return self._kept([Text(text)] if self._tools is None else self._tools.feed(text))
        return self._kept(self._behind_reasoning(self._reasoning.feed(text)))

    def close(self) -> list[Event]:
        """End; return what was held back."""
        events = [] if self._reasoning is None else self._behind_reasoning(self._reasoning.close())
        return self._kept([*events, *(self._tools.close() if self._tools is not None else [])])

    def _behind_reasoning(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        found: list[Event] = []
        for event in events:
            found += self._tools.feed(event.text) if isinstance(event, Text) else [event]
        return joined(found)

    def _kept(self, events: list[Event]) -> list[Event]:
        kept = []
        for event in events:
            if isinstance(event, CallBegin):
                self._over = self._over or (bool(self.calls) and not self._parallel)
                self.calls += not self._over
            if not self._over:
                kept.append(event)
        return kept
