"""What the pool makes of a worker that misbehaves in ways a real one can't be brought to: scripted, real sockets."""

from __future__ import annotations

import asyncio
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.config import ServeSettings
from app.errors import DeadlineExceededError, EngineCrashedError, EngineError, ModelFailedError, RequestError
from app.messages import Sampling
from app.observability.metrics import Metrics
from app.pool.load_command import load_command
from app.pool.pool import Limits, Pool
from app.pool.request import GenerationRequest, PoolState, TextPrompt, TokenPrompt

CHILD = """
import os, socket, sys, time
import msgspec
from app.messages import *
kind, folder, link = sys.argv[1], sys.argv[2], socket.socket(fileno=int(sys.argv[-1]))
reader, decode = FrameReader(), msgspec.msgpack.Decoder(LoadModel | Generate | Cancel | RenderText).decode
frames = []
def send(message):
    link.sendall(encode_frame(message))
def receive():
    while not frames:
        data = link.recv(65536)
        if not data:
            sys.exit(0)
        frames.extend(reader.feed(data))
    return decode(frames.pop(0))
def hello():
    send(Hello(kind, os.getpid(), vocabulary_size=100, context_length=64, slots=2, capabilities=["completion"]))
def step(*pieces):
    send(Step(list(pieces), Load(1, 0, 1, 10, 0, 1, 0, 0.01)))
receive()
birth = len(os.listdir(folder))
open(os.path.join(folder, f"{kind}{os.getpid()}"), "w").close()
"""
TEXT = "hello()\nwhile True: receive()\n"


@asynccontextmanager
async def scripted(tmp_path: Path, script: str, limits: Limits | None = None, **settings: Any) -> AsyncIterator[Pool]:
    folders = [tmp_path / "text-births", tmp_path / "worker-births"]
    commands = []
    for kind, folder, source in zip(("text", "worker"), folders, (TEXT, script), strict=True):
        folder.mkdir()
        path = tmp_path / f"{kind}.py"
        path.write_text(CHILD + textwrap.dedent(source))
        commands.append([sys.executable, str(path), kind, str(folder)])
    pool = Pool(
        ServeSettings(parallel=2, queue=1, **settings),
        tmp_path,
        "scripted",
        Metrics(),
        limits=limits,
        commands=(commands[0], commands[1]),
    )
    pool.spawn()
    try:
        await pool.start()
        yield pool
    finally:
        pids = [pid for pid in pool.child_pids.values() if pid is not None]
        await pool.close()
        assert pool._admission.taken == 0
        assert not any(psutil.pid_exists(pid) for pid in pids)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 40))


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.002)


def request(**fields: Any) -> GenerationRequest:
    defaults: dict[str, Any] = {
        "prompts": [TokenPrompt([1, 2, 3])],
        "max_tokens": 5,
        "sampling": Sampling(),
        "stop": [],
        "ignore_eos": False,
        "top_logprobs": None,
        "request_id": "test",
    }
    return GenerationRequest(**defaults | fields)


def test_a_refusal_of_the_worker_becomes_its_error(tmp_path: Path) -> None:
    script = """
    hello()
    send(Refused(receive().request, "RequestError", "min_p is odd", "min_p"))
    send(Refused(receive().request, "NoSuchError", "whatever"))
    receive()
    """

    async def scenario() -> None:
        async with scripted(tmp_path, script) as pool:
            await until(lambda: pool.state is PoolState.READY)
            with pytest.raises(RequestError, match="min_p is odd") as caught:
                await pool.open(request())
            assert caught.value.param == "min_p"
            with pytest.raises(EngineError, match="NoSuchError: whatever"):
                await pool.open(request())

    run(scenario())


def test_trouble_of_one_sequence_ends_its_stream_alone(tmp_path: Path) -> None:
    script = """
    hello()
    bad, good = receive(), receive()
    send(Accepted(bad.request)), send(Accepted(good.request))
    step(Piece(bad.request, "a", 1), Piece(good.request, "b", 1))
    step(Piece(bad.request, "", 1, "error", error="logits are NaN"), Piece(good.request, "c", 2, "stop"))
    receive()
    """

    async def scenario() -> None:
        async with scripted(tmp_path, script) as pool:
            await until(lambda: pool.state is PoolState.READY)
            bad, good = await asyncio.gather(pool.open(request()), pool.open(request()))
            stream = aiter(bad)
            assert (await anext(stream))[0].piece.text == "a"
            with pytest.raises(EngineError, match="NaN"):
                await anext(stream)
            assert [piece.text for piece in await good.collect()] == ["bc"]
            await bad.aclose()
            await good.aclose()
            text = pool._all_metrics.render().decode()
            assert 'request_failure_total{error_type="engine_error",model_name="scripted"} 1.0' in text
            assert 'request_success_total{finished_reason="stop",model_name="scripted"} 1.0' in text

    run(scenario())


def test_a_deadline_ends_what_waits_and_what_streams(tmp_path: Path) -> None:
    script = """
    hello()
    receive()
    receive()  # it is cancelled
    streaming = receive().request
    send(Accepted(streaming))
    step(Piece(streaming, "a", 1))
    while True:
        receive()
    """

    async def scenario() -> None:
        async with scripted(tmp_path, script, request_timeout=0.3) as pool:
            await until(lambda: pool.state is PoolState.READY)
            with pytest.raises(DeadlineExceededError, match=r"longer than the 0\.3 s"):
                await pool.open(request())
            generation = await pool.open(request())
            updates = aiter(generation)
            assert [update.piece.text for update in await anext(updates)] == ["a"]
            with pytest.raises(DeadlineExceededError):
                await anext(updates)
            await generation.aclose()

    run(scenario())


def test_waiting_for_a_fresh_worker_is_bounded(tmp_path: Path) -> None:
    script = """
    if birth:
        time.sleep(60)  # the second never gets ready
    hello()
    send(Accepted(receive().request))
    receive()
    os.abort()
    """

    async def scenario() -> None:
        async with scripted(tmp_path, script, Limits(restart_wait=0.5)) as pool:
            await until(lambda: pool.state is PoolState.READY)
            generation = await pool.open(request())
            started = time.monotonic()
            with pytest.raises(EngineCrashedError) as caught:
                await pool.open(request())  # its frame ends the worker
            assert 0.4 < time.monotonic() - started < 5
            assert caught.value.retry_after
            with pytest.raises(EngineCrashedError):
                await generation.collect()
            await generation.aclose()

    run(scenario())


def test_deaths_while_loading_fail_with_the_last_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scripted(tmp_path, "print('ggml says: out of cheese', flush=True); os._exit(7)") as pool:
            await until(lambda: pool.state is PoolState.FAILED)
            assert "exit status 7" in (pool.failure or "")
            assert "out of cheese" in (pool.failure or "")
            assert len(list((tmp_path / "worker-births").iterdir())) == 3
            with pytest.raises(ModelFailedError):
                await pool.open(request())

    run(scenario())


def test_garbage_on_the_link_is_a_death(tmp_path: Path) -> None:
    script = """
    hello()
    first = receive()
    if birth:
        send(Accepted(first.request))
        step(Piece(first.request, "cured", 1, "stop"))
        receive()
    link.sendall(b"\\xff\\xff\\xff\\xffHTTP/1.1 400")
    time.sleep(60)
    """

    async def scenario() -> None:
        async with scripted(tmp_path, script) as pool:
            await until(lambda: pool.state is PoolState.READY)
            generation = await pool.open(request())
            assert [piece.text for piece in await generation.collect()] == ["cured"]
            await generation.aclose()

    run(scenario())


def test_a_worker_that_ignores_the_end_of_its_socket_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scripted(tmp_path, "hello()\ntime.sleep(60)") as pool:
            await until(lambda: pool.state is PoolState.READY)
            started = time.monotonic()
            await pool.close()
            assert 1 < time.monotonic() - started < 2.5

    run(scenario())


def test_output_without_line_breaks_is_bounded(tmp_path: Path) -> None:
    script = """
    os.write(2, b"x" * 500_000)
    os.write(2, b"\\xff last\\n")
    os._exit(1)
    """

    async def scenario() -> None:
        async with scripted(tmp_path, script) as pool:
            await until(lambda: pool.state is PoolState.FAILED)
            assert len(pool.failure or "") < 200_000
            assert "last" in (pool.failure or "")

    run(scenario())


def test_a_deadline_also_ends_what_is_still_being_rendered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scripted(tmp_path, "hello()\nwhile True: receive()\n", request_timeout=0.3) as pool:
            await until(lambda: pool.state is PoolState.READY)
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                await pool.open(request(prompts=[TextPrompt("never rendered")]))
            assert time.monotonic() - started < 2

    run(scenario())


def test_what_is_computed_alone_gets_one_slot_and_keeps_no_prefixes(tmp_path: Path) -> None:
    settings = ServeSettings(parallel=4, kv_tokens=512, ctx_size=0, cache_disk=10, deterministic=True)
    command = load_command(settings, tmp_path / "model.gguf")
    assert (command.slots, command.kv_tokens, command.context_length, command.deterministic) == (1, 0, 512, True)
    assert (command.prefix_memory_bytes, command.prefix_disk_bytes) == (0, 0)
    assert command.speculate == "off"


def test_guesses_come_from_the_text_and_a_draft_model_unless_they_are_off(tmp_path: Path) -> None:
    model, small = tmp_path / "model.gguf", str(tmp_path / "small.gguf")
    assert load_command(ServeSettings(), model).speculate == "lookup"
    command = load_command(ServeSettings(draft_model=small), model)
    assert (command.speculate, command.draft_path) == ("lookup", small)
    command = load_command(ServeSettings(draft_model=small, speculate="off"), model)
    assert (command.speculate, command.draft_path) == ("off", "")
