"""The text child: one model's chat template and tokenizer, without its weights, under limits of its own.

A thread with a large stack does the work, one request at a time, in order; the main thread only reads the socket,
so that the end of the parent is noticed in the middle of a template that never ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import resource
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.chat.formats import KNOWN_TEMPLATE_VARIABLES, reasoning_marks
from app.childhood import end_with_parent
from app.errors import GrammarRefusedError, ModelLoadError, PestleError, PromptRefusedError
from app.llama.library import build_name
from app.llama.model import VocabularyModel
from app.messages import (
    Compiled,
    CompileGrammar,
    FrameReader,
    Hello,
    LoadFailed,
    LoadModel,
    Refused,
    TextAnswer,
    TextWork,
    ToText,
    encode_frame,
    param_of,
)
from app.text.answers import Answers
from app.text.chat_renderer import ChatRenderer
from app.text.inputs import InputRenderer
from app.text.template import ChatTemplate
from app.text.tokenize import SMALL_STACK_BYTES, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from app.chat.formats import ToolForm
    from app.llama.vocab import Vocabulary
    from app.messages import Trigger
    from app.text.grammar_check import GrammarChecker

    Compiler = Callable[[CompileGrammar], tuple[str, Trigger | None]]

_MEMORY_HEADROOM_BYTES = 2 * 1024 * 1024 * 1024  # over what is mapped after loading; half of it is a large stack
_RECEIVE_BYTES = 262144


def main(arguments: list[str]) -> int:
    """Serve the socket whose file descriptor is the only argument, until the parent closes it."""
    link = socket.socket(fileno=int(arguments[1]))
    end_with_parent()
    requests = _requests(link)
    first = next(requests, None)
    if not isinstance(first, LoadModel):
        return 1
    pending: queue.SimpleQueue[ToText] = queue.SimpleQueue()
    threading.stack_size(SMALL_STACK_BYTES)
    worker = threading.Thread(target=_serve_or_end, args=(link, first, pending), daemon=True)
    worker.start()
    for request in requests:
        pending.put(request)
    os._exit(0)  # the parent has gone; a template may still be looping


def _serve_or_end(link: socket.socket, load: LoadModel, pending: queue.SimpleQueue[ToText]) -> None:
    """Serve; an error that nobody foresaw ends the process, because the parent waits for an answer or an end."""
    try:
        _serve(link, load, pending)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _serve(link: socket.socket, load: LoadModel, pending: queue.SimpleQueue[ToText]) -> None:
    started = time.monotonic()
    try:
        model = VocabularyModel(Path(load.path))
    except ModelLoadError as error:
        link.sendall(encode_frame(LoadFailed(error.message)))
        os._exit(1)
    tokenizer = Tokenizer(model)
    _limit_memory()
    template = ChatTemplate(model.chat_template, model.name or Path(load.path).stem, tokenizer.special_tokens())
    chats = ChatRenderer(template)
    hello = Hello(
        child="text",
        pid=os.getpid(),
        vocabulary_size=model.vocabulary.size,
        context_length=model.trained_context,
        model_name=model.name,
        architecture=model.architecture,
        has_chat_template=template.refusal is None,
        fills_in=tokenizer.fills_in,
        tool_form=chats.tool_form,
        reasoning_marks=reasoning_marks(template.source),
        template_variables=sorted(template.variables & KNOWN_TEMPLATE_VARIABLES),
        library_build=build_name(),
        load_seconds=time.monotonic() - started,
    )
    link.sendall(encode_frame(hello))
    answers = Answers(chats, InputRenderer(model, tokenizer), tokenizer)
    compiled = _grammar_compiler(model.vocabulary, chats.tool_form, hello.reasoning_marks)
    while True:
        request = pending.get()
        if not isinstance(request, LoadModel):
            link.sendall(encode_frame(_answer(request, answers, compiled)))


def _answer(request: TextWork, answers: Answers, compiled: Compiler) -> TextAnswer | Refused:
    try:
        if isinstance(request, CompileGrammar):
            return Compiled(request.request, *compiled(request))
        return answers.answer(request)
    except PestleError as error:
        return Refused(request.request, type(error).__name__, error.message, error.param)
    except MemoryError:
        if isinstance(request, CompileGrammar):
            message = "this grammar needs more memory than one request may take"
            return Refused(request.request, GrammarRefusedError.__name__, message, request.param)
        message = "this prompt needs more memory to render and tokenize than one request may take"
        return Refused(request.request, PromptRefusedError.__name__, message, param_of(request))


def _grammar_compiler(vocabulary: Vocabulary, form: ToolForm, reasoning: tuple[str, str] | None) -> Compiler:
    """Return what compiles grammars; it is imported with the first of them: few servers ever get one."""

    @functools.cache
    def checker() -> GrammarChecker:
        from app.text.grammar_check import GrammarChecker  # noqa: PLC0415

        return GrammarChecker(vocabulary, form, reasoning)

    return lambda request: checker().compiled(request)


def _requests(link: socket.socket) -> Iterator[ToText]:
    """Yield what the parent sends until it is gone."""
    reader = FrameReader()
    decoder = msgspec.msgpack.Decoder(ToText)
    while True:
        try:
            data = link.recv(_RECEIVE_BYTES)
        except ConnectionError:
            return
        if not data:
            return
        for body in reader.feed(data):
            yield decoder.decode(body)


def _limit_memory() -> None:
    """Bound the address space to a generous step over what is mapped now, where the system can tell and keep it."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limit = pages * resource.getpagesize() + _MEMORY_HEADROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
