"""What goes to the text child: in which order, and that what cannot be sent harms its own request only."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest

from app.errors import PromptRefusedError, QueueFullError
from app.messages import Hello, RenderChat, Rendered, RenderText, Tokenize, Tokenized, encode_frame
from app.pool.text_client import TextClient
from app.pool.text_service import TextService

HELLO = Hello("text", 1, 100, 64)


class Child:
    """Takes frames as a link does, which encodes them."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def send(self, message: msgspec.Struct) -> None:
        """Encode a frame."""
        encode_frame(message)
        self.taken.append(message)

    def kill(self) -> None:
        """Never needed here."""
        raise AssertionError


def new_client() -> tuple[TextClient, Child]:
    """Return a client whose child is up."""
    client, child = TextClient(5.0), Child()
    client.supervisor = child
    client.on_ready(HELLO)
    return client, child


def poison(number: int) -> RenderChat:
    """Return a chat with a number that MessagePack has no room for."""
    return RenderChat(number, [], template_arguments={"a": 10**30})


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run within a few seconds."""
    asyncio.run(asyncio.wait_for(main, 5))


def test_what_cannot_be_sent_is_refused_alone() -> None:
    async def main() -> None:
        client, child = new_client()
        for number in range(8):
            with pytest.raises(PromptRefusedError):
                await client.render(poison(number))
        asked = asyncio.create_task(client.render(RenderText(9, "good")))
        await asyncio.sleep(0)
        assert [message.request for message in child.taken] == [9]
        client.on_message(Rendered(9, b""))
        assert (await asked).request == 9
        assert client.waiting == 0

    run(main())


def test_a_fresh_child_gets_the_good_ones() -> None:
    async def main() -> None:
        client, child = TextClient(5.0), Child()
        client.supervisor = child
        asked = [asyncio.create_task(client.render(message)) for message in (poison(1), RenderText(2, "good"))]
        await asyncio.sleep(0)
        client.on_ready(HELLO)
        assert [message.request for message in child.taken] == [2]
        client.on_message(Rendered(2, b""))
        refused, rendered = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(refused, PromptRefusedError)
        assert isinstance(rendered, Rendered)

    run(main())


def test_texts_go_behind_prompts_one_at_a_time() -> None:
    async def main() -> None:
        client, child = new_client()
        texts = [asyncio.create_task(client.tokenize(Tokenize(n, "t", True, True, False))) for n in (1, 2)]
        await asyncio.sleep(0)
        prompt = asyncio.create_task(client.render(RenderText(3, "p")))
        await asyncio.sleep(0)
        assert [message.request for message in child.taken] == [1, 3]
        client.on_message(Tokenized(1, b"", None))
        assert [message.request for message in child.taken] == [1, 3, 2]
        client.on_message(Rendered(3, b""))
        client.on_message(Tokenized(2, b"", None))
        await asyncio.gather(*texts, prompt)

    run(main())


def test_texts_that_wait_are_bounded() -> None:
    async def main() -> None:
        client, _ = new_client()
        service = TextService(client, iter(range(1000)), lambda: None)

        async def ask() -> Tokenized:
            return await service.tokenize("t", add_special=True, parse_special=True, with_pieces=False)

        waiting = [asyncio.create_task(ask()) for _ in range(32)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await ask()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        again = asyncio.create_task(ask())
        await asyncio.sleep(0)
        assert not again.done()
        again.cancel()

    run(main())
