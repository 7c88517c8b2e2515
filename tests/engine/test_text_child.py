"""The real text child over a real socket: templates, BOS, limits, and prompts that kill other servers."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from app.messages import (
    FrameReader,
    FromText,
    Hello,
    LoadFailed,
    LoadModel,
    Refused,
    RenderChat,
    Rendered,
    RenderText,
    encode_frame,
)
from app.models.gguf import read_header
from app.models.gguf_types import ValueType
from quantize.header import KeyTable, Value, encode_header

ITEM_TYPES = {"tokens": ValueType.STRING, "merges": ValueType.STRING, "token_type": ValueType.INT32}
DECODER = msgspec.msgpack.Decoder(FromText)


class Child:
    """A text child and the parent's end of its socket."""

    def __init__(self, model: Path) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "app.text", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.socket = ours
        self.socket.settimeout(60)
        self._reader = FrameReader()
        self._bodies: list[bytes] = []
        self.send(LoadModel(str(model)))

    def send(self, message: msgspec.Struct) -> None:
        self.socket.sendall(encode_frame(message))

    def receive(self) -> Any:
        while not self._bodies:
            data = self.socket.recv(1 << 18)
            if not data:
                raise EOFError
            self._bodies += self._reader.feed(data)
        return DECODER.decode(self._bodies.pop(0))

    def ask(self, message: RenderChat | RenderText) -> list[int]:
        self.send(message)
        answer = self.receive()
        assert isinstance(answer, Rendered), answer
        assert answer.request == message.request
        return [int(token) for token in np.frombuffer(answer.tokens, "<i4")]

    def refusal(self, message: RenderChat | RenderText) -> Refused:
        self.send(message)
        answer = self.receive()
        assert isinstance(answer, Refused), answer
        return answer

    def close(self) -> None:
        self.socket.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        try:
            self.process.wait(5)
        finally:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def running(model: Path) -> Iterator[tuple[Child, Hello]]:
    child = Child(model)
    try:
        hello = child.receive()
        assert isinstance(hello, Hello), hello
        yield child, hello
    finally:
        child.close()


VocabularyFile = Callable[..., Path]


@pytest.fixture(scope="module")
def vocabulary_file(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> VocabularyFile:
    """Return a function that writes the default model's vocabulary, without weights, with some keys changed."""
    header = read_header(default_model)
    folder = tmp_path_factory.mktemp("vocabularies")

    def write(name: str, **changes: Any) -> Path:
        table = KeyTable()
        for key, content in header.metadata.items():
            item_type = ITEM_TYPES.get(key.rsplit(".", 1)[-1]) if header.types[key] is ValueType.ARRAY else None
            if header.types[key] is not ValueType.ARRAY or item_type is not None:
                table.values[key] = Value(header.types[key], content, item_type)
        for field, content in changes.items():
            key = "tokenizer.chat_template" if field == "chat_template" else f"tokenizer.ggml.{field}"
            table.values.pop(key, None)
            if isinstance(content, bool):
                table.boolean(key, content)
            elif isinstance(content, int):
                table.u32(key, content)
            elif content is not None:
                table.text(key, content)
        path = folder / f"{name}.gguf"
        path.write_bytes(encode_header(table, []))
        return path

    return write


@pytest.fixture(scope="module")
def child(default_model: Path) -> Iterator[Child]:
    with running(default_model) as (child, _):
        yield child


def chat(content: object, request: int = 1) -> RenderChat:
    return RenderChat(request, [{"role": "user", "content": content}])


def test_hello_describes_the_vocabulary(default_model: Path) -> None:
    with running(default_model) as (child, hello):
        assert hello.child == "text"
        assert hello.pid == child.process.pid
        assert hello.vocabulary_size == 49152
        assert hello.context_length == 8192
        assert hello.has_chat_template
        assert hello.architecture == "llama"


def test_chat_becomes_the_models_own_tokens(child: Child) -> None:
    tokens = child.ask(RenderChat(1, [{"role": "system", "content": "S"}, {"role": "user", "content": "hello"}]))
    start, end = 1, 2  # <|im_start|>, <|im_end|>
    assert tokens[0] == start
    assert tokens.count(start) == 3  # system, user and the assistant's turn to come
    assert tokens.count(end) == 2
    assert tokens == child.ask(
        RenderText(2, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    )


def test_answers_come_in_order(child: Child) -> None:
    for request in range(50):
        child.send(chat("x" * request, request) if request % 2 else RenderText(request, "y" * request + "z"))
    assert [child.receive().request for _ in range(50)] == list(range(50))


def test_text_of_nothing_has_no_tokens(child: Child) -> None:
    assert child.ask(RenderText(1, "")) == []


def test_odd_text_survives(child: Child) -> None:
    for text in ("\x00 a\x00", "🙂‍🙂" * 50, "\ufffe\U0010ffff", "é" * 10_000):
        assert child.ask(RenderText(1, text))
        assert child.ask(chat(text))


def test_bos_comes_exactly_once_when_the_model_wants_it(vocabulary_file: VocabularyFile) -> None:
    plain_template = "{{ messages[0].content }}"
    bos = 1
    with running(vocabulary_file("bos", add_bos_token=True, chat_template=plain_template)) as (child, _):
        assert child.ask(RenderText(1, "hi"))[0] == bos
        assert child.ask(RenderText(1, "hi")).count(bos) == 1
        assert child.ask(RenderText(1, "<|im_start|>hi")) == child.ask(RenderText(1, "hi"))
        assert child.ask(RenderText(1, "")) == [bos]
        assert child.ask(chat("hi")) == child.ask(RenderText(1, "hi"))
        assert child.ask(chat("<|im_start|>hi")) == child.ask(RenderText(1, "hi"))
    with running(vocabulary_file("no-bos", add_bos_token=False, chat_template=plain_template)) as (child, _):
        assert bos not in child.ask(RenderText(1, "hi"))
        assert bos not in child.ask(chat("hi"))
        assert child.ask(chat("<|im_start|>hi"))[0] == bos


def test_a_template_that_refuses_is_quoted(vocabulary_file: VocabularyFile) -> None:
    with running(vocabulary_file("raise", chat_template="{{ raise_exception('no tools here') }}")) as (child, _):
        refused = child.refusal(chat("x", 5))
        assert (refused.request, refused.error, refused.param) == (5, "TemplateRefusedError", "messages")
        assert "no tools here" in refused.message


def test_a_model_without_template_still_completes(vocabulary_file: VocabularyFile) -> None:
    with running(vocabulary_file("bare", chat_template=None)) as (child, hello):
        assert not hello.has_chat_template
        refused = child.refusal(chat("x"))
        assert refused.error == "TemplateRefusedError"
        assert "/v1/completions" in refused.message
        assert hello.model_name in refused.message
        assert child.ask(RenderText(1, "hi"))


def test_a_template_that_eats_memory_is_refused_and_the_child_lives(vocabulary_file: VocabularyFile) -> None:
    source = "{% if messages[0].content == 'eat' %}{{ 'a' * 9999999999 }}{% endif %}fine"
    with running(vocabulary_file("memory", chat_template=source)) as (child, _):
        refused = child.refusal(chat("eat"))
        assert (refused.error, refused.param) == ("PromptRefusedError", "messages")
        assert "memory" in refused.message
        assert child.ask(chat("x"))


def test_too_many_bytes_are_refused_with_both_numbers(child: Child) -> None:
    refused = child.refusal(RenderText(1, "a" * 1_048_577))
    assert (refused.error, refused.param) == ("PromptRefusedError", "prompt")
    assert "1048577" in refused.message
    assert "1048576" in refused.message


@pytest.mark.parametrize("letter", ["a", "!", "é"])
@pytest.mark.parametrize("splitter", ["tekken", "deepseek-llm"])
def test_killer_prompts_only_cost_time(vocabulary_file: VocabularyFile, splitter: str, letter: str) -> None:
    """std::regex recurses in these pre-tokenizers: 30,000 of one letter end a thread with a usual stack."""
    with running(vocabulary_file(splitter, pre=splitter)) as (child, _):
        assert child.ask(RenderText(1, letter * 30_000))
        assert child.ask(RenderText(2, letter * 300_000))
        assert child.process.poll() is None


def test_the_killer_prompt_does_kill_on_a_usual_stack(vocabulary_file: VocabularyFile) -> None:
    """Or else the test above shows nothing."""
    script = (
        "import sys, threading, pathlib; from app.llama.model import VocabularyModel as V\n"
        "m = V(pathlib.Path(sys.argv[1])); threading.stack_size(8 << 20)\n"
        "t = threading.Thread(target=lambda: m.tokenize('a' * 30_000)); t.start(); t.join(); print('lived')"
    )
    path = vocabulary_file("tekken-small", pre="tekken")
    finished = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        check=False,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )
    assert finished.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", None])
def test_a_file_that_is_no_model_fails_with_its_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    child = Child(path)
    answer = child.receive()
    assert isinstance(answer, LoadFailed)
    assert "broken.gguf" in answer.message
    assert child.process.wait(10) == 1
    child.close()


@pytest.mark.parametrize(
    "template",
    ["{{ " + "9" * 5000 + " }}", "{% for i in [1] %}" * 30 + "x" + "{% endfor %}" * 30],
    ids=["a number that Python refuses", "loops nested deeper than Python's"],
)
def test_a_template_that_python_cannot_compile_is_refused(vocabulary_file: VocabularyFile, template: str) -> None:
    with running(vocabulary_file("uncompiled", chat_template=template)) as (child, hello):
        assert not hello.has_chat_template
        assert "does not compile" in child.refusal(chat("x")).message
        assert child.ask(RenderText(2, "Hi"))


def test_it_leaves_with_its_parent_even_in_an_endless_template(vocabulary_file: VocabularyFile) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    child = Child(vocabulary_file("endless", chat_template=endless))
    assert isinstance(child.receive(), Hello)
    child.send(chat("x"))
    time.sleep(0.3)
    assert child.process.poll() is None
    started = time.monotonic()
    child.close()
    assert child.process.returncode == 0
    assert time.monotonic() - started < 2


def test_signals_of_the_terminal_are_left_to_the_parent(child: Child) -> None:
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.process.pid, signal_number)
    assert child.ask(RenderText(1, "still here"))
