"""Prompts and grammars on their way through the text child: in order, each with a deadline; a culprit is refused."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from app.errors import GrammarRefusedError, PestleError, PromptRefusedError
from app.messages import (
    Compiled,
    CompileGrammar,
    Detokenize,
    Hello,
    Refused,
    RenderChat,
    Rendered,
    RenderedInputs,
    RenderInfill,
    RenderInputs,
    RenderPairs,
    RenderText,
    TextAnswer,
    TextWork,
    Tokenize,
    Tokenized,
    WriteChat,
    Written,
    param_of,
)
from app.observability.logging import get_logger
from app.pool.refusal import refusal_error

if TYPE_CHECKING:
    import msgspec

log = get_logger(__name__)

_WINDOW = 4  # prompts in the child's hands: enough that it never waits for the next

_PATIENT = Tokenize | Detokenize | WriteChat  # of which one at a time is sent: whoever waits for an answer goes before


class Sender(Protocol):
    """What a client needs of its supervisor."""

    def send(self, message: msgspec.Struct) -> None:
        """Send a frame to the child that runs now."""

    def kill(self) -> None:
        """Kill the child that runs now."""


class _Pending:
    __slots__ = ("future", "message")

    def __init__(self, message: TextWork, future: asyncio.Future[TextAnswer]) -> None:
        self.message = message
        self.future = future

    def refuse(self, cause: str) -> None:
        """Answer that the child did not survive it, or not in time."""
        if self.future.done():
            return
        message = self.message
        if isinstance(message, CompileGrammar):
            text = f"compiling this grammar {cause}; make it simpler"
            self.future.set_exception(GrammarRefusedError(text, param=message.param))
        else:
            text = f"rendering or tokenizing this prompt {cause}; change it"
            self.future.set_exception(PromptRefusedError(text, param=param_of(message)))


class TextClient:
    """Sends prompts to the text child and hands back their tokens.

    The child works in order, so the oldest unanswered prompt is the one it is at: when the child dies, or when the
    deadline passes (then it is killed), that prompt is refused, and the others are sent to the next child.
    """

    def __init__(self, deadline: float) -> None:
        self.supervisor: Sender | None = None
        self._deadline = deadline  # seconds that one prompt may take
        self._sent: dict[int, _Pending] = {}  # in the order of sending: the child is at the first
        self._unsent: dict[int, _Pending] = {}
        self._up = False
        self._timer: asyncio.TimerHandle | None = None
        self._overdue = False

    @property
    def waiting(self) -> int:
        """Prompts without an answer."""
        return len(self._sent) + len(self._unsent)

    async def render(self, message: RenderChat | RenderText | RenderInfill) -> Rendered:
        """Return the prompt's tokens.

        Raises TemplateRefusedError, PromptRefusedError, UnsupportedFieldError, and what `fail_all` was told.
        """
        answer = await self._ask(message)
        assert isinstance(answer, Rendered)  # noqa: S101 - what the child answers to a prompt
        return answer

    async def render_inputs(self, message: RenderInputs | RenderPairs) -> list[bytes]:
        """Return the token ids of each input, int32 little-endian. Raises the same errors as `render`."""
        answer = await self._ask(message)
        assert isinstance(answer, RenderedInputs)  # noqa: S101 - what the child answers to inputs
        return answer.inputs

    async def write(self, message: WriteChat | Detokenize) -> str:
        """Return a text. Raises as `render` does."""
        answer = await self._ask(message)
        assert isinstance(answer, Written)  # noqa: S101 - as above
        return answer.text

    async def tokenize(self, message: Tokenize) -> Tokenized:
        """Return the tokens of a text. Raises PromptRefusedError, and what `fail_all` was told."""
        answer = await self._ask(message)
        assert isinstance(answer, Tokenized)  # noqa: S101 - as above
        return answer

    async def compile(self, message: CompileGrammar) -> Compiled:
        """Return the grammar in the form that the worker takes.

        Raises GrammarRefusedError, and what `fail_all` was told.
        """
        answer = await self._ask(message)
        assert isinstance(answer, Compiled)  # noqa: S101 - what the child answers to a grammar
        return answer

    async def _ask(self, message: TextWork) -> TextAnswer:
        pending = _Pending(message, asyncio.get_running_loop().create_future())
        self._unsent[message.request] = pending
        self._pump()
        try:
            return await pending.future
        finally:
            self._unsent.pop(message.request, None)  # what was sent stays: it may still be the culprit of a death

    def fail_all(self, error: PestleError) -> None:
        """Answer every waiting prompt with this error."""
        for pending in (*self._sent.values(), *self._unsent.values()):
            if not pending.future.done():
                pending.future.set_exception(error)

    def on_ready(self, hello: Hello) -> None:  # noqa: ARG002 - the pool reads it
        """Send what waits to the fresh child."""
        self._up = True
        self._pump()

    def on_message(self, message: Any) -> None:
        """Take an answer."""
        answer: TextAnswer | Refused = message
        pending = self._sent.pop(answer.request, None)
        self._arm()
        self._pump()
        if pending is None or pending.future.done():
            return
        if isinstance(answer, Refused):
            pending.future.set_exception(refusal_error(answer))
        else:
            pending.future.set_result(answer)

    def on_down(self) -> bool:
        """Refuse the prompt that the dead child was at, keep the others; return whether there was one."""
        self._up = False
        overdue, self._overdue = self._overdue, False
        sent, self._sent = self._sent, {}
        self._arm()
        if not sent:
            return False
        culprit = sent.pop(next(iter(sent)))
        self._unsent = {key: pending for key, pending in sent.items() if not pending.future.done()} | self._unsent
        cause = f"takes longer than {self._deadline:g} s" if overdue else "ends the process that does it"
        log.warning("a prompt or grammar was refused", extra={"cause": cause})
        culprit.refuse(cause)
        return True

    def _pump(self) -> None:
        """Send what waits, as far as the window goes: a prompt whose client leaves before that costs nothing."""
        assert self.supervisor is not None  # noqa: S101 - the pool wires it before anything runs
        while self._up and self._unsent and len(self._sent) < _WINDOW:
            request = self._next()
            if request is None:
                return
            pending = self._unsent.pop(request)
            try:
                self.supervisor.send(pending.message)
            except (OverflowError, TypeError, ValueError):
                pending.refuse("takes a value that no frame between our processes can hold")
                continue
            self._sent[request] = pending
            if len(self._sent) == 1:
                self._arm()

    def _next(self) -> int | None:
        """Return who is sent next: prompts that are to be answered, then, one at a time, what only wants text."""
        for request, pending in self._unsent.items():
            if not isinstance(pending.message, _PATIENT):
                return request
        if any(isinstance(pending.message, _PATIENT) for pending in self._sent.values()):
            return None
        return next(iter(self._unsent), None)

    def _arm(self) -> None:
        """Start the clock of the prompt that the child is at now, if there is one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._up and self._sent:
            self._timer = asyncio.get_running_loop().call_later(self._deadline, self._kill_overdue)

    def _kill_overdue(self) -> None:
        assert self.supervisor is not None  # noqa: S101 - see _pump
        self._overdue = True
        self.supervisor.kill()
