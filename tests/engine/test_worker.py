"""The worker as a process, spoken to in frames."""

from __future__ import annotations

import os
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
import psutil
import pytest

from app.messages import (
    Accepted,
    Cancel,
    FrameReader,
    FromWorker,
    Generate,
    Hello,
    LoadFailed,
    LoadModel,
    Piece,
    Refused,
    Sampling,
    Step,
    encode_frame,
)

GREEDY = Sampling(temperature=0)
PROMPT = np.array([504, 3575, 282, 4649, 314], "<i4").tobytes()  # "The capital of France is"


class Worker:
    """The parent's side of one worker."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "app.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        self.socket.settimeout(60)
        self._reader, self._bodies = FrameReader(), list[bytes]()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)

    def send(self, *messages: msgspec.Struct) -> None:
        self.socket.sendall(b"".join(encode_frame(message) for message in messages))

    def receive(self) -> FromWorker:
        while not self._bodies:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._bodies += self._reader.feed(data)
        return self._decoder.decode(self._bodies.pop(0))

    def pieces_until(self, done: Callable[[Piece], bool]) -> list[Piece]:
        pieces: list[Piece] = []
        while not any(done(piece) for piece in pieces):
            message = self.receive()
            if isinstance(message, Step):
                pieces += message.pieces
        return pieces

    def load(self, model: Path, **more: Any) -> FromWorker:
        self.send(LoadModel(str(model), device="cpu", **more))
        return self.receive()

    def close(self) -> int:
        self.socket.close()
        try:
            return self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stderr is not None
            self.process.stderr.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def loaded(worker: Worker, default_model: Path) -> Worker:
    hello = worker.load(default_model, slots=2, context_length=1024)
    assert isinstance(hello, Hello)
    return worker


def test_hello_says_everything(worker: Worker, default_model: Path) -> None:
    hello = worker.load(default_model, slots=3)
    assert isinstance(hello, Hello)
    assert (hello.child, hello.pid, hello.slots) == ("worker", worker.process.pid, 3)
    assert (hello.vocabulary_size, hello.context_length, hello.architecture) == (49152, 8192, "llama")
    assert hello.parameters > 134_000_000
    assert 130_000_000 < hello.model_bytes < 150_000_000
    assert hello.has_chat_template
    assert "Q8_0" in hello.description
    assert "llama-cpp-python" in hello.library_build
    assert hello.device == "CPU"
    assert hello.load_seconds > 0
    assert hello.model_name


def test_requests_are_accepted_then_answered(loaded: Worker) -> None:
    loaded.send(Generate(7, PROMPT, 4, GREEDY))
    assert loaded.receive() == Accepted(7)
    pieces = loaded.pieces_until(lambda piece: piece.finish_reason is not None)
    assert "".join(piece.text for piece in pieces).startswith(" Paris.")
    assert [piece.completion_tokens for piece in pieces] == [1, 2, 3, 4]


def test_what_does_not_fit_is_refused(loaded: Worker) -> None:
    loaded.send(Generate(1, PROMPT, 1020, GREEDY))
    refused = loaded.receive()
    assert isinstance(refused, Refused)
    assert refused.error == "ContextLengthError"
    assert "1025" in refused.message
    assert "1024" in refused.message


def test_a_file_that_is_no_model_fails_the_load(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "not.gguf"
    path.write_bytes(b"nothing")
    failed = worker.load(path)
    assert isinstance(failed, LoadFailed)
    assert str(path) in failed.message
    assert worker.process.wait(10) == 1


def test_a_closed_socket_ends_it_at_once_even_in_a_prompt(loaded: Worker) -> None:
    loaded.send(Generate(1, np.full(1000, 500, "<i4").tobytes(), 4, GREEDY))
    assert loaded.receive() == Accepted(1)
    time.sleep(0.1)  # now it computes
    started = time.monotonic()
    assert loaded.close() == 0
    assert time.monotonic() - started < 0.5


def test_a_closed_socket_ends_it_while_it_loads(worker: Worker, default_model: Path) -> None:
    worker.send(LoadModel(str(default_model)))
    assert worker.close() == 0


def test_a_worker_speculates_with_a_draft_model(worker: Worker, default_model: Path) -> None:
    more = {"slots": 2, "context_length": 512, "speculate": "lookup", "draft_path": str(default_model)}
    assert isinstance(worker.load(default_model, **more), Hello)
    worker.send(Generate(1, PROMPT * 4, 60, GREEDY, ignore_eos=True))
    assert worker.pieces_until(lambda piece: piece.finish_reason is not None)[-1].completion_tokens == 60


def test_a_draft_model_that_is_not_there_is_said(worker: Worker, default_model: Path, tmp_path: Path) -> None:
    answer = worker.load(default_model, slots=1, speculate="lookup", draft_path=str(tmp_path / "none.gguf"))
    assert isinstance(answer, LoadFailed)
    assert "none.gguf is not a file" in answer.message


def test_signals_are_the_parents_business(loaded: Worker) -> None:
    os.kill(loaded.process.pid, signal.SIGINT)
    os.kill(loaded.process.pid, signal.SIGTERM)
    loaded.send(Generate(1, PROMPT, 1, GREEDY))
    loaded.pieces_until(lambda piece: piece.finish_reason is not None)
    assert loaded.process.poll() is None


def test_cancel_is_honoured_within_a_step(loaded: Worker) -> None:
    loaded.send(Generate(1, PROMPT, 900, GREEDY, ignore_eos=True))
    loaded.pieces_until(lambda piece: piece.completion_tokens == 3)
    loaded.send(Cancel(1))
    last = loaded.pieces_until(lambda piece: piece.finish_reason is not None)[-1]
    assert last.finish_reason == "cancelled"
    assert last.completion_tokens < 900


def test_idle_costs_no_cpu(loaded: Worker) -> None:
    process = psutil.Process(loaded.process.pid)
    time.sleep(0.3)
    before = process.cpu_times()
    time.sleep(1)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) <= 0.02


def test_what_is_not_a_frame_ends_it_with_a_message(worker: Worker) -> None:
    worker.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert worker.process.wait(30) == 1
    assert worker.process.stderr is not None
    assert b"cannot understand the parent" in worker.process.stderr.read()


def test_usage_without_a_descriptor() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "app.worker"], check=False, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 2
    assert "usage" in finished.stderr
