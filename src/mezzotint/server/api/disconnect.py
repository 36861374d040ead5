"""Notices that a client has closed its connection while its request is being worked on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from mezzotint.server.work.tickets import ClientGone

Result = TypeVar("Result")


async def or_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, or ClientGone when the client hangs up before it has it.

    The request's body must have been read. Plain handlers are not told of a disconnect, hence the watching.
    """
    watching = asyncio.ensure_future(_disconnected(receive))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():  # also where the result came in the same moment: nobody is there to read it
            raise ClientGone
        return working.result()
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
