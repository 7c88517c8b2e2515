"""The client may go before its answer is there: then the work for it is cancelled, at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from litestar.types import Receive

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The connection is closed: nobody reads what would be answered."""


async def unless_gone(receive: Receive, work: Coroutine[object, object, Result]) -> Result:
    """Return the result of `work`, which begins after the whole body has been received.

    Raises ClientGoneError when the client goes first; the work has then been cancelled and has ended. When the
    work finished in spite of that, its result is returned: whoever owns it must clean up, and will notice the
    client's absence at the next step.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if working.cancelled():
        raise ClientGoneError
    return working.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
