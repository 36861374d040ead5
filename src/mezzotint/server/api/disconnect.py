"""Notices that a client has closed its connection while its request is being worked on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from mezzotint.errors import MezzotintError
from mezzotint.server.work.admission import Admission
from mezzotint.server.work.tickets import Answer, ClientGone, Ticket

Result = TypeVar("Result")


async def answer_or_gone(admission: Admission, ticket: Ticket, receive: Receive) -> Answer:
    """The answer for one attached client; ClientGone, with the ticket let go, when it hangs up first."""
    try:
        answer = await or_gone(receive, ticket.outcome(), lambda: admission.let_go(ticket))
    except MezzotintError:
        admission.release(ticket)
        raise
    admission.release(ticket)
    return answer


async def or_gone(receive: Receive, work: Coroutine[Any, Any, Result], on_gone: Callable[[], None]) -> Result:
    """The result of `work`, or ClientGone (after `on_gone`) when the client hangs up before it has it.

    The request's body must have been read. Plain handlers are not told of a disconnect, hence the watching.
    """
    watching = asyncio.ensure_future(_disconnected(receive))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():  # also where the result came in the same moment: nobody is there to read it
            raise ClientGone
        return working.result()
    except (ClientGone, asyncio.CancelledError):
        on_gone()
        raise
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
