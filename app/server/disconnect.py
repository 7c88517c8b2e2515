"""The client may go before its answer is there: then the work for it is cancelled, at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from litestar.types import Receive

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The connection is closed: nobody reads what would be answered."""


async def unless_gone(
    receive: Receive,
    work: Coroutine[object, object, Result],
    release: Callable[[Result], Awaitable[None]] | None = None,
) -> Result:
    """Return the result of `work`, which begins after the whole body has been received.

    Raises ClientGoneError when the client goes first; the work has then been cancelled and has ended. When the
    work finished in spite of that, its result is returned: whoever owns it must clean up, and will notice the
    client's absence at the next step. When the caller itself is cancelled, a finished result goes to `release`.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        await _end(working, leaving)
        if release is not None and not working.cancelled() and working.exception() is None:
            await release(working.result())
        raise
    await _end(working, leaving)
    if working.cancelled():
        raise ClientGoneError
    return working.result()


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
