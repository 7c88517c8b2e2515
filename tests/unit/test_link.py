"""A link cuts frames out of any chunks, calls once for each, and hangs up on what is no frame."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest

from app.messages import Accepted, Cancel, FromWorker, Load, Piece, Step, encode_frame
from app.pool.link import Link

DECODER = msgspec.msgpack.Decoder(FromWorker)
STEP = Step([Piece(1, "a", 1)], Load(1, 0, 5, 10, 0, 1, 0, 0.008))


async def connect(received: list[object]) -> tuple[Link, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    link = Link(DECODER, received.append)
    await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
    return link, theirs


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_frames_arrive_whole_and_in_order(chunk: int) -> None:
    async def scenario() -> None:
        received: list[object] = []
        link, theirs = await connect(received)
        data = encode_frame(Accepted(1)) + encode_frame(STEP) + encode_frame(Accepted(2))
        for start in range(0, len(data), chunk):
            theirs.send(data[start : start + chunk])
            await asyncio.sleep(0)
        theirs.close()
        await asyncio.wait_for(link.closed, 5)
        assert received == [Accepted(1), STEP, Accepted(2)]

    asyncio.run(scenario())


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1", encode_frame(Cancel(1))])
def test_what_is_no_frame_of_a_worker_ends_the_link(garbage: bytes) -> None:
    async def scenario() -> None:
        received: list[object] = []
        link, theirs = await connect(received)
        theirs.send(garbage)
        await asyncio.wait_for(link.closed, 5)
        assert received == []
        theirs.close()

    asyncio.run(scenario())


def test_sending_goes_out_as_a_frame_and_to_nobody_afterwards() -> None:
    async def scenario() -> None:
        link, theirs = await connect([])
        link.send(Cancel(9))
        assert await asyncio.get_running_loop().sock_recv(theirs, 100) == encode_frame(Cancel(9))
        theirs.close()
        await asyncio.wait_for(link.closed, 5)
        link.send(Cancel(10))
        link.abort()

    asyncio.run(scenario())
