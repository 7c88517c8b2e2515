"""The pool with its real children and a real model: streams, deaths, deadlines, cancellations, drains."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from app.config import ServeSettings
from app.errors import (
    ContextLengthError,
    DrainingError,
    EngineCrashedError,
    LoadingError,
    ModelFailedError,
    ModelNotFoundError,
    PromptRefusedError,
    QueueFullError,
    RequestError,
    TemplateRefusedError,
)
from app.messages import Sampling
from app.observability.metrics import Metrics
from app.pool.generation import Generation
from app.pool.pool import Limits, Pool
from app.pool.request import ChatPrompt, GenerationRequest, PoolState, Prompt, TextPrompt, TokenPrompt
from app.pool.supervisor import Breaker

TEMPLATE = (
    "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% elif messages[0].content == 'raise' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ messages[0].content }}"
)
PROMPT = TextPrompt("The quick brown fox jumps over the lazy dog. " * 4)


@pytest.fixture(scope="module")
def model_file(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the default model with a template that loops or raises when told to."""
    data = default_model.read_bytes()
    key = b"tokenizer.chat_template"
    start = data.index(key) + len(key) + 4 + 8  # type, length
    length = int.from_bytes(data[start - 8 : start], "little")
    padding = length - len(TEMPLATE) - len("{##}")
    assert padding >= 0
    template = "{#" + " " * padding + "#}" + TEMPLATE
    path = tmp_path_factory.mktemp("pool") / "tiny.gguf"
    path.write_bytes(data[:start] + template.encode() + data[start + length :])
    return path


def request(*prompts: Prompt, **fields: Any) -> GenerationRequest:
    defaults: dict[str, Any] = {
        "prompts": list(prompts) or [PROMPT],
        "max_tokens": 8,
        "sampling": Sampling(temperature=0),
        "stop": [],
        "ignore_eos": True,
        "top_logprobs": None,
        "request_id": "test",
    }
    return GenerationRequest(**defaults | fields)


def chat(content: str, **fields: Any) -> GenerationRequest:
    return request(ChatPrompt([{"role": "user", "content": content}]), **fields)


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def running(model_file: Path, limits: Limits | None = None, **settings: Any) -> AsyncIterator[Pool]:
    values: dict[str, Any] = {"parallel": 2, "queue": 2, "ctx_size": 512, "threads": 1} | settings
    pool = Pool(ServeSettings(**values), model_file, "tiny", Metrics(), limits=limits)
    pool.spawn()
    try:
        await pool.start()
        await until(lambda: pool.state is PoolState.READY)
        yield pool
    finally:
        pids = [pid for pid in pool.child_pids.values() if pid is not None]
        started = time.monotonic()
        await pool.close()
        assert time.monotonic() - started < 2.5
        assert not any(psutil.pid_exists(pid) for pid in pids)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 90)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


async def answer(pool: Pool, asked: GenerationRequest) -> list[str]:
    generation = await pool.open(asked)
    try:
        return [piece.text for piece in await generation.collect()]
    finally:
        await generation.aclose()


async def first_bytes(generation: Generation) -> AsyncIterator[Any]:
    stream = aiter(generation)
    await anext(stream)
    return stream


def kill(pool: Pool, child: str) -> None:
    pid = pool.child_pids[child]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def assert_nothing_held(pool: Pool) -> None:
    assert pool._admission.taken == 0
    assert pool._worker.running == 0
    assert not pool._open


async def worker_is_idle(pool: Pool) -> None:
    """All slots are free again, seen from outside: as many requests as there are slots run together."""
    answers = await asyncio.gather(*[answer(pool, request(max_tokens=2)) for _ in range(2)])
    assert answers[0] == answers[1]


def test_streams_text_tokens_and_chats(model_file: Path) -> None:
    written = int(model_file.stat().st_mtime)

    async def scenario() -> None:
        async with running(model_file) as pool:
            whole = await answer(pool, request(max_tokens=12))
            generation = await pool.open(request(max_tokens=12))
            pieces = [update.piece async for updates in generation for update in updates]
            assert "".join(piece.text for piece in pieces) == whole[0]
            assert pieces[-1].finish_reason == "length"
            assert generation.completion_tokens == 12
            assert generation.prompt_tokens == 41
            assert not generation.closed
            await generation.aclose()
            tokens = [504, 2365, 6354, 16438]
            assert await answer(pool, request(TokenPrompt(tokens)))
            assert await answer(pool, chat(PROMPT.text, max_tokens=12)) == whole
            assert_nothing_held(pool)

            info = pool.model("tiny")
            assert info in pool.models()
            assert (info.ready, info.context_length, info.slots) == (True, 512, 2)
            assert info.created == written
            with pytest.raises(ModelNotFoundError, match=r"'other'.*'tiny'"):
                pool.model("other")

    run(scenario())


def test_choices_are_numbered_by_prompt_and_counted_once(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            short = TextPrompt("Once upon a time")
            expected = [await answer(pool, request(prompt)) for prompt in (PROMPT, short)]
            generation = await pool.open(request(PROMPT, short, n=2))
            pieces = await generation.collect()
            assert [p.text for p in pieces] == [*expected[0] * 2, *expected[1] * 2]
            assert generation.prompt_tokens == 41 + 4
            assert generation.completion_tokens == 4 * 8
            await generation.aclose()

            sampled = request(n=4, sampling=Sampling(temperature=2.0, seed=11), max_tokens=12)
            first = await answer(pool, sampled)
            assert len(set(first)) > 1  # each choice has its own seed
            assert await answer(pool, sampled) == first

    run(scenario())


def test_what_does_not_fit_is_refused_with_the_numbers(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            long = TextPrompt("word " * 600)
            with pytest.raises(ContextLengthError, match=r"512 tokens.* 601 tokens") as caught:
                await pool.open(request(long, max_tokens=None))
            assert caught.value.param == "prompt"
            with pytest.raises(ContextLengthError) as caught:
                await pool.open(chat(long.text, max_tokens=None))
            assert caught.value.param == "messages"
            numbers = r"512 tokens.*541: 41 in 'prompt' and 500.*471 or less"
            with pytest.raises(ContextLengthError, match=numbers) as caught:
                await pool.open(request(max_tokens=500, max_tokens_param="max_completion_tokens"))
            assert caught.value.param == "max_completion_tokens"
            generation = await pool.open(request(TokenPrompt([504] * 500), max_tokens=None))
            (piece,) = await generation.collect()
            assert (piece.completion_tokens, piece.finish_reason) == (12, "length")
            await generation.aclose()
            for prompt in (TextPrompt(""), TokenPrompt([])):
                with pytest.raises(RequestError, match="'prompt' has no tokens"):
                    await pool.open(request(prompt))
            for token in (-1, 49152, 2**40):
                with pytest.raises(RequestError, match=f"token id {token} .*0 to 49151") as wrong:
                    await pool.open(request(TokenPrompt([1, token])))
                assert wrong.value.param == "prompt"
                with pytest.raises(RequestError) as wrong:
                    await pool.open(request(sampling=Sampling(logit_bias={token: 1.0})))
                assert wrong.value.param == "logit_bias"
            with pytest.raises(TemplateRefusedError, match="not this"):
                await pool.open(chat("raise"))
            assert_nothing_held(pool)

    run(scenario())


def test_a_full_queue_says_when_to_come_back(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            held = [await pool.open(request(max_tokens=60)) for _ in range(4)]
            started = time.monotonic()
            with pytest.raises(QueueFullError, match="4 of 4") as caught:
                await pool.open(request())
            assert time.monotonic() - started < 0.1
            assert 1 <= (caught.value.retry_after or 0) <= 60
            await held[0].aclose()
            assert await answer(pool, request(max_tokens=1))
            for generation in held[1:]:
                await generation.aclose()
            assert_nothing_held(pool)
            await worker_is_idle(pool)
            with pytest.raises(RequestError, match="5 sequences"):
                await pool.open(request(n=5))

    run(scenario())


def test_worker_death_before_the_first_byte_is_cured(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            expected = await answer(pool, request(max_tokens=40))
            generations = [await pool.open(request(max_tokens=40)) for _ in range(3)]  # one of them waits
            collecting = [asyncio.create_task(generation.collect()) for generation in generations]
            await until(lambda: generations[0].completion_tokens > 3)
            kill(pool, "worker")
            await until(lambda: pool.state is PoolState.LOADING)
            with pytest.raises(LoadingError) as caught:
                await pool.open(request())
            assert caught.value.retry_after
            for generation, task in zip(generations, collecting, strict=True):
                assert [piece.text for piece in await task] == expected
                assert generation.completion_tokens == 40
                await generation.aclose()
            assert_nothing_held(pool)
            text = pool._all_metrics.render().decode()
            assert 'pestle_worker_restarts_total{model_name="tiny"} 1.0' in text

    run(scenario())


def test_a_second_death_before_the_first_byte_is_a_503(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            generation = await pool.open(request(max_tokens=400))
            collecting = asyncio.create_task(generation.collect())
            for _ in range(2):
                await until(lambda: pool.state is PoolState.READY and generation.completion_tokens > 0)
                kill(pool, "worker")
                await until(lambda: pool.state is PoolState.LOADING)
            with pytest.raises(EngineCrashedError) as caught:
                await collecting
            assert caught.value.status == 503
            assert caught.value.retry_after
            await generation.aclose()
            await until(lambda: pool.state is PoolState.READY)
            assert await answer(pool, request())
            assert_nothing_held(pool)

    run(scenario())


def test_worker_death_in_mid_stream_is_an_error_in_the_stream(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            streaming = await pool.open(request(max_tokens=400))
            waiting = await pool.open(request(max_tokens=4))
            stream = await first_bytes(streaming)
            kill(pool, "worker")
            died = time.monotonic()
            with pytest.raises(EngineCrashedError):
                async for _ in stream:
                    pass
            assert time.monotonic() - died < 1
            await streaming.aclose()
            assert (await waiting.collect())[0].completion_tokens == 4
            await waiting.aclose()
            assert time.monotonic() - died < 10
            assert_nothing_held(pool)

    run(scenario())


def test_deaths_in_a_row_mark_the_model_failed(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file, Limits(breaker=Breaker(deaths=3, window=60))) as pool:
            waiting = await pool.open(request(max_tokens=400))
            await first_bytes(waiting)
            for death in range(3):
                await until(lambda: pool.state is PoolState.READY)
                kill(pool, "worker")
                await until(lambda: pool.state is not PoolState.READY)
                if death == 0:
                    await waiting.aclose()
            await until(lambda: pool.state is PoolState.FAILED)
            assert "SIGKILL" in (pool.failure or "")
            with pytest.raises(ModelFailedError):
                await pool.open(request())
            assert pool.child_pids["worker"] is None
            assert_nothing_held(pool)

    run(scenario())


def test_a_file_that_cannot_be_loaded_fails_at_once_with_the_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "broken.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
        pool = Pool(ServeSettings(), path, "broken", Metrics())
        with pytest.raises(LoadingError):
            await pool.open(request())
        pool.spawn()
        await pool.start()
        await until(lambda: pool.state is PoolState.FAILED)
        assert "broken.gguf" in (pool.failure or "")
        with pytest.raises(ModelFailedError) as caught:
            await pool.open(request())
        assert str(tmp_path) not in caught.value.message  # clients need not know our folders
        await pool.close()

    run(scenario())


def test_no_stream_notices_the_text_childs_death(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            streaming = await pool.open(request(max_tokens=100))
            stream = await first_bytes(streaming)
            for _ in range(2):
                kill(pool, "text")
                await until(lambda: pool._text_child.hello is None)
                assert pool.state is PoolState.READY
                assert await answer(pool, request(max_tokens=1))  # waits for the fresh one
            pieces = [update.piece async for updates in stream for update in updates]
            assert pieces[-1].finish_reason == "length"
            assert streaming.completion_tokens == 100
            await streaming.aclose()
            assert_nothing_held(pool)

    run(scenario())


def test_only_the_prompt_that_never_ends_is_refused(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file, Limits(text_deadline=0.5), queue=10) as pool:
            streaming = await pool.open(request(max_tokens=80))
            before = [asyncio.create_task(answer(pool, request(max_tokens=1))) for _ in range(2)]
            culprit = asyncio.create_task(answer(pool, chat("loop")))
            behind = [asyncio.create_task(answer(pool, chat(PROMPT.text, max_tokens=1))) for _ in range(5)]
            with pytest.raises(PromptRefusedError, match=r"longer than 0\.5 s") as caught:
                await culprit
            assert (caught.value.status, caught.value.param) == (400, "messages")
            assert len({tuple(await task) for task in (*before, *behind)}) == 1
            assert (await streaming.collect())[0].completion_tokens == 80
            await streaming.aclose()
            assert_nothing_held(pool)

    run(scenario())


def test_a_prompt_that_ends_its_process_is_refused_and_not_tried_again(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            culprit = asyncio.create_task(pool.open(chat("loop")))
            behind = asyncio.create_task(answer(pool, request(max_tokens=1)))
            await until(lambda: pool._text._sent)
            await asyncio.sleep(0.1)
            pid = pool.child_pids["text"]
            os.kill(pid or 0, signal.SIGSEGV)  # as a tokenizer's overflowing stack does
            with pytest.raises(PromptRefusedError, match="ends the process"):
                await culprit
            assert await behind
            assert pool.child_pids["text"] != pid
            for _ in range(3):  # deaths with a culprit don't count
                culprit = asyncio.create_task(pool.open(chat("loop")))
                await until(lambda: pool._text_child.hello and pool._text._sent)
                kill(pool, "text")
                with pytest.raises(PromptRefusedError):
                    await culprit
            assert await answer(pool, request())
            assert_nothing_held(pool)

    run(scenario())


def test_cancelling_open_anywhere_leaves_nothing(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            requests = (
                request(PROMPT, PROMPT, n=2, max_tokens=200),
                request(TokenPrompt([504] * 300), n=4, max_tokens=200),
            )
            for delay in (0, 0.0003, 0.001, 0.003, 0.01, 0.03):
                for asked in requests:
                    await cancel_after(pool, asked, delay)
            for delay in (0, 0.05):
                await cancel_after(pool, chat("loop"), delay)
                if pool._text._sent:
                    kill(pool, "text")  # it would loop on until its deadline
            async with asyncio.timeout(15):  # far from enough for what was cancelled
                await worker_is_idle(pool)

    async def cancel_after(pool: Pool, asked: GenerationRequest, delay: float) -> None:
        opening = asyncio.create_task(pool.open(asked))
        await asyncio.sleep(delay)
        opening.cancel()
        try:
            generation = await opening
        except asyncio.CancelledError:
            pass
        else:
            await generation.aclose()
        assert_nothing_held(pool)

    run(scenario())


def test_closing_frees_the_slot_within_a_step(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file, parallel=1, queue=3, batch_size=32, ctx_size=2048) as pool:
            for stage in ("prefilling", "decoding", "queued"):
                running_one = await pool.open(request(TokenPrompt([504] * 400), max_tokens=1600))
                other = await pool.open(request(max_tokens=1))  # can't begin before
                if stage == "decoding":
                    await first_bytes(running_one)
                if stage == "queued":
                    third = await pool.open(request(max_tokens=1600))
                    await third.aclose()
                closed = time.monotonic()
                await running_one.aclose()
                assert (await other.collect())[0].completion_tokens == 1
                assert time.monotonic() - closed < 3
                await other.aclose()
                assert_nothing_held(pool)
            text = pool._all_metrics.render().decode()
            assert 'request_success_total{finished_reason="cancelled",model_name="tiny"} 4.0' in text

    run(scenario())


def test_drain_lets_streams_finish_and_takes_nothing_new(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            streams = [await pool.open(request(max_tokens=30)) for _ in range(3)]
            finishing = [asyncio.create_task(collect_and_close(stream)) for stream in streams]
            draining = asyncio.create_task(pool.drain(30))
            await asyncio.sleep(0)
            assert pool.state is PoolState.DRAINING
            with pytest.raises(DrainingError) as caught:
                await pool.open(request())
            assert caught.value.retry_after
            assert [await task for task in finishing] == [30, 30, 30]
            await asyncio.wait_for(draining, 0.5)

    async def collect_and_close(generation: Generation) -> int:
        (piece,) = await generation.collect()
        await generation.aclose()
        return piece.completion_tokens

    run(scenario())


def test_drain_fails_what_is_late(model_file: Path) -> None:
    async def scenario() -> None:
        async with running(model_file) as pool:
            late = await pool.open(request(max_tokens=400))
            stream = await first_bytes(late)
            rendering = asyncio.create_task(pool.open(chat("loop")))
            await until(lambda: pool._text._sent)
            started = time.monotonic()
            await pool.drain(0.3)
            assert 0.25 < time.monotonic() - started < 1
            with pytest.raises(DrainingError):
                async for _ in stream:
                    pass
            with pytest.raises(DrainingError):
                await rendering
            await late.aclose()
            assert_nothing_held(pool)

    run(scenario())


def test_children_see_a_clean_environment(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")

    async def scenario() -> None:
        async with running(model_file) as pool:
            for pid in pool.child_pids.values():
                seen = psutil.Process(pid).environ()
                assert seen["GGML_NO_BACKTRACE"] == "1"
                assert seen["OMP_WAIT_POLICY"] == "passive"
                assert not seen.keys() & {"LLM_API_KEY", "PYTHONPATH"}

    run(scenario())


def test_closing_before_the_children_have_loaded(model_file: Path) -> None:
    async def scenario(start: Callable[[Pool], Awaitable[None]]) -> None:
        pool = Pool(ServeSettings(), model_file, "tiny", Metrics())
        pool.spawn()
        pids = [pid for pid in pool.child_pids.values() if pid]
        await start(pool)
        await pool.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)

    async def not_at_all(_pool: Pool) -> None:
        return

    run(scenario(Pool.start))
    run(scenario(not_at_all))
