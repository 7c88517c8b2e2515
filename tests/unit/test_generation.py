"""A generation merges what a slow reader has not taken, counts right, and ends exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from app.errors import EngineCrashedError
from app.messages import Piece, TokenLogprob
from app.pool.generation import Generation, Update

Result = TypeVar("Result")


class Owner:
    def __init__(self) -> None:
        self.closed: list[Generation] = []

    def finished(self, generation: Generation) -> None:
        self.closed.append(generation)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 10))


def piece(text: str, tokens: int, finish: Any = None, logprobs: list[TokenLogprob] | None = None) -> Piece:
    return Piece(7, text, tokens, finish, cached_tokens=3, logprobs=logprobs)


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token, b"x", -0.5)


async def everything(generation: Generation) -> list[list[Update]]:
    return [updates async for updates in generation]


def test_a_quick_reader_gets_pieces_untouched() -> None:
    async def scenario() -> None:
        generation = Generation(Owner(), 1, 1)
        reading = asyncio.create_task(everything(generation))
        sent = [piece("a", 1), piece("b", 2), piece("", 3, "stop")]
        for item in sent:
            await asyncio.sleep(0.001)
            generation.push(0, item)
        received = await reading
        assert [updates[0].piece for updates in received] == sent
        assert received[0][0].piece is sent[0]

    run(scenario())


def test_a_slow_reader_gets_them_merged_by_choice() -> None:
    async def scenario() -> None:
        generation = Generation(Owner(), 1, 2)
        generation.push(0, piece("Hel", 1, logprobs=[logprob(1)]))
        generation.push(1, piece("x", 1))
        generation.push(0, piece("lo", 2, logprobs=[logprob(2), logprob(3)]))
        generation.push(0, piece("!", 4, "length"))
        generation.push(1, piece("y", 2, "stop"))
        ((first, second),) = await everything(generation)
        assert (first.index, second.index) == (0, 1)
        assert first.piece == piece("Hello!", 4, "length", [logprob(1), logprob(2), logprob(3)])
        assert second.piece == piece("xy", 2, "stop")
        assert generation.completion_tokens == 6

    run(scenario())


def test_merging_leaves_the_workers_lists_alone() -> None:
    async def scenario() -> None:
        generation = Generation(Owner(), 1, 1)
        sent = piece("a", 1, logprobs=[logprob(1)])
        generation.push(0, sent)
        generation.push(0, piece("b", 2, "stop", [logprob(2)]))
        await everything(generation)
        assert sent.logprobs == [logprob(1)]

    run(scenario())


def test_collect_waits_for_every_choice_and_delivers_nothing_before() -> None:
    async def scenario() -> None:
        generation = Generation(Owner(), 2, 1)
        collecting = asyncio.create_task(generation.collect())
        generation.push(0, piece("a", 1))
        await asyncio.sleep(0.001)
        generation.push(1, piece("z", 1, "stop"))
        await asyncio.sleep(0.001)
        assert not collecting.done()
        assert not generation.delivered
        generation.push(0, piece("b", 2, "length"))
        assert [p.text for p in await collecting] == ["ab", "z"]
        assert generation.delivered

    run(scenario())


def test_a_restart_forgets_what_was_not_read() -> None:
    async def scenario() -> None:
        generation = Generation(Owner(), 1, 1)
        generation.push(0, piece("old", 3))
        generation.restart(0)
        assert generation.completion_tokens == 0
        generation.push(0, piece("new", 1, "stop"))
        assert [p.text for p in await generation.collect()] == ["new"]
        assert generation.completion_tokens == 1

    run(scenario())


def test_cached_tokens_count_each_prompt_once() -> None:
    generation = Generation(Owner(), 2, 2)
    for index in range(4):
        generation.push(index, piece("a", 1))
        generation.push(index, piece("b", 2))
    assert generation.cached_tokens == 6  # three a prompt


def test_an_error_comes_after_what_is_already_there() -> None:
    async def scenario() -> None:
        generation = Generation(Owner(), 1, 1)
        generation.push(0, piece("a", 1))
        generation.fail(EngineCrashedError("first"))
        generation.fail(EngineCrashedError("second"))
        stream = aiter(generation)
        assert (await anext(stream))[0].piece.text == "a"
        with pytest.raises(EngineCrashedError, match="first"):
            await anext(stream)

    run(scenario())


def test_an_error_after_the_end_changes_nothing() -> None:
    async def scenario() -> None:
        generation = Generation(Owner(), 1, 1)
        generation.push(0, piece("a", 1, "stop"))
        generation.fail(EngineCrashedError("late"))
        assert len(await everything(generation)) == 1

    run(scenario())


def test_closing_is_reported_once_and_ends_the_reader() -> None:
    async def scenario() -> None:
        owner = Owner()
        generation = Generation(owner, 1, 1)
        reading = asyncio.create_task(everything(generation))
        await asyncio.sleep(0.001)
        await generation.aclose()
        await generation.aclose()
        assert await reading == []
        assert owner.closed == [generation]

    run(scenario())


def test_accepted_means_every_choice() -> None:
    async def scenario() -> None:
        generation = Generation(Owner(), 1, 2)
        waiting = asyncio.create_task(generation.accepted())
        generation.accept()
        await asyncio.sleep(0.001)
        assert not waiting.done()
        generation.accept()
        await waiting

        refused = Generation(Owner(), 1, 1)
        refused.fail(EngineCrashedError("gone"))
        with pytest.raises(EngineCrashedError):
            await refused.accepted()

    run(scenario())


def test_a_shortcut_takes_pieces_that_the_reader_waits_for_but_not_the_last() -> None:
    async def scenario() -> None:
        generation = Generation(Owner(), 1, 1)
        taken: list[str] = []
        open_road = True

        def shortcut() -> bool:
            if open_road:
                taken.extend(update.piece.text for update in generation.take())
            return open_road

        generation.listen(shortcut)
        generation.push(0, piece("a", 1))  # nobody waits yet
        reading = asyncio.create_task(everything(generation))
        await asyncio.sleep(0.001)
        generation.push(0, piece("b", 2))
        open_road = False
        generation.push(0, piece("c", 3))
        open_road = True
        generation.push(0, piece("d", 4))  # the reader is awake and has not taken the one before yet
        await asyncio.sleep(0.001)
        generation.push(0, piece("e", 5, "stop"))
        read = [updates[0].piece.text for updates in await reading]
        assert (taken, read) == (["b", "cd"], ["a", "e"])
        assert generation.delivered

    run(scenario())


def test_a_complete_answer_cannot_fail_any_more() -> None:
    generation = Generation(Owner(), 1, 1)
    generation.push(0, piece("a", 1, "stop"))
    assert not generation.fail(EngineCrashedError("too late"))
    assert generation.error is None
