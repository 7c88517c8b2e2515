from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.server.disconnect import ClientGoneError, unless_gone


async def _stays() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def _leaves() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def _answer() -> str:
    return "answer"


def test_the_result_comes_while_the_client_stays() -> None:
    assert asyncio.run(unless_gone(_stays, _answer())) == "answer"


def test_work_is_cancelled_when_the_client_goes() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")

    with pytest.raises(ClientGoneError):
        asyncio.run(unless_gone(_leaves, work()))
    assert ended == ["work"]


def test_a_result_that_comes_as_its_caller_is_cancelled_is_released() -> None:
    released: list[str] = []

    async def release(result: str) -> None:
        released.append(result)

    async def scenario() -> None:
        finish = asyncio.Event()

        async def work() -> str:
            await finish.wait()
            return "answer"

        caller = asyncio.ensure_future(unless_gone(_stays, work(), release))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        finish.set()
        await asyncio.sleep(0)  # the work is finished in this very tick
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller

    asyncio.run(scenario())
    assert released == ["answer"]
