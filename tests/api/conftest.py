"""A real uvicorn on a real port in front of an engine that is told what to do, for what HTTP alone decides."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import openai
import pytest

from app.config import ServeSettings
from app.errors import ModelNotFoundError, PestleError
from app.messages import Piece, TokenLogprob
from app.observability.metrics import Metrics
from app.pool.generation import Generation
from app.pool.request import GenerationRequest, ModelInfo, PoolState
from app.server.run import bind, build_server
from tests.api import tiny_models


class ScriptedPool:
    """Stands where the pool stands and answers each choice with `words`, one every `pause` seconds."""

    def __init__(self) -> None:
        self.state = PoolState.READY
        self.failure: str | None = None
        self.words = ["Hello", ", ", "world"]
        self.pause = 0.0
        self.finish_reason: Any = "stop"
        self.open_error: PestleError | Exception | None = None
        self.open_seconds = 0.0
        self.prompt_end = ""
        self.error_after_words: PestleError | None = None
        self.requests: list[GenerationRequest] = []
        self.opening = 0
        self.running: set[Generation] = set()
        self._tasks: dict[Generation, asyncio.Task[None]] = {}

    def model(self, model_id: str) -> ModelInfo:
        if model_id != "org/scripted":
            raise ModelNotFoundError(f"no model {model_id!r}", param="model")
        return ModelInfo(id=model_id, created=1700000000, context_length=2048, bytes=7, ready=True)

    def models(self) -> list[ModelInfo]:
        return [self.model("org/scripted")]

    async def open(self, request: GenerationRequest) -> Generation:
        self.requests.append(request)
        self.opening += 1
        try:
            await asyncio.sleep(self.open_seconds)
        finally:
            self.opening -= 1
        if self.open_error is not None:
            raise self.open_error
        generation = Generation(self, len(request.prompts), request.n)
        generation.prompt_tokens = 11
        generation.prompt_end = self.prompt_end
        self.running.add(generation)
        self._tasks[generation] = asyncio.create_task(self._play(generation, request))
        return generation

    def finished(self, generation: Generation) -> None:
        self._tasks.pop(generation).cancel()
        self.running.remove(generation)

    async def _play(self, generation: Generation, request: GenerationRequest) -> None:
        choices = range(len(request.prompts) * request.n)
        for number, word in enumerate(self.words, 1):
            await asyncio.sleep(self.pause)
            logprobs = None if request.top_logprobs is None else [TokenLogprob(number, word.encode(), -0.5)]
            for index in choices:
                generation.push(index, Piece(1, word, number, cached_tokens=4, logprobs=logprobs))
        if self.error_after_words is not None:
            generation.fail(self.error_after_words)
            return
        for index in choices:
            generation.push(index, Piece(1, "", len(self.words), self.finish_reason))


class EdgeServer:
    """uvicorn with our protocol and application, on a thread of its own."""

    def __init__(self, settings: ServeSettings | None = None) -> None:
        self.pool = ScriptedPool()
        settings = settings or ServeSettings()
        self._listener = bind("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        pool: Any = self.pool
        self._server = build_server(pool, settings, Metrics())
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self._listener])))

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request on a connection of its own; returns status, headers in lower case, body."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send("POST", path, body, {"content-type": "application/json", **names})

    def connect(self, data: bytes = b"", timeout: float = 20) -> socket.socket:
        """Open a raw connection and send these bytes."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        connection.sendall(data)
        return connection


def eventually(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of random weights and a vocabulary of bytes."""
    return tiny_models.bytes_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="session")
def sentences_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of random weights that wants BOS."""
    return tiny_models.sentences_model(tmp_path_factory.mktemp("sentences"))


@pytest.fixture(scope="session")
def filling_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of random weights that fills in the middle."""
    return tiny_models.filling_model(tmp_path_factory.mktemp("filling"))


@pytest.fixture
def edge() -> Iterator[EdgeServer]:
    """Return a running server with a scripted pool."""
    with EdgeServer() as server:
        yield server


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., None]:
    return eventually


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=100) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (model,) = client.models.list().data
    return model.id
