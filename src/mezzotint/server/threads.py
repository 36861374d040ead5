"""Threads by purpose: what is slow in one place holds up nothing else, and nothing here holds up the end.

The threads are daemons, because a source or a database that hangs can be interrupted by nobody. Who waits for
one is told after a limit; the thread is lost to its purpose until the call comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

from mezzotint.errors import MezzotintError, UnavailableError

Result = TypeVar("Result")
RETRY_S = 5.0


@dataclass(slots=True, eq=False)
class _Call:
    """One piece of work; whoever waits for it sets `given_up`."""

    work: Callable[[], Any]
    deliver: Callable[[Any, BaseException | None], None]
    given_up: bool = False

    def perform(self) -> None:
        if self.given_up:
            return
        try:
            result = self.work()
        except BaseException as error:  # raised again where it is waited for
            self.deliver(None, error)
        else:
            self.deliver(result, None)


_current: ContextVar[_Call | None] = ContextVar("current", default=None)


class GivenUpError(Exception):
    """Nobody waits for this work any more, so it changes nothing."""


def require_caller() -> None:
    """GivenUpError in work whose caller has been told that it was not done; a transaction then rolls back."""
    call = _current.get()
    if call is not None and call.given_up:
        raise GivenUpError


class Threads:
    """Runs blocking calls, `most` at once, for one purpose."""

    def __init__(
        self, name: str, most: int, limit_s: float | None, code: str = "server_busy", max_waiting: int = 4096
    ) -> None:
        """`limit_s` is how long a caller waits, its turn included; None is for ever.

        `name` says in the error what did not answer. More than `max_waiting` calls are refused at once.
        """
        self.name = name
        self.limit_s = limit_s
        self._most = most
        self._code = code
        self._max_waiting = max_waiting
        self._waiting: deque[_Call] = deque()
        self._idle = 0
        self._num_threads = 0
        self._changed = threading.Condition()
        """Guards the three above."""

    async def run(self, work: Callable[..., Result], *arguments: Any, limit_s: float | None = None) -> Result:
        """What `work(*arguments)` returns or raises; UnavailableError when that takes longer than the limit.

        `limit_s` may shorten the limit. Work that has not begun by then never does.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def deliver(result: Any, error: BaseException | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        def post(result: Any, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone
                loop.call_soon_threadsafe(deliver, result, error)

        context = copy_context()
        call = _Call(lambda: None, post)
        context.run(_current.set, call)
        call.work = lambda: context.run(work, *arguments)
        self._submit(call)
        limits = [each for each in (self.limit_s, limit_s) if each is not None]
        try:
            done, _ = await asyncio.wait({future}, timeout=min(limits, default=None))
            if done:
                return future.result()
            raise self._late(min(limits))
        finally:
            call.given_up = True
            if not future.cancel() and not future.cancelled():
                future.exception()  # or asyncio would log one that nobody has read

    def _late(self, limit_s: float) -> MezzotintError:
        return UnavailableError(
            f"the server's {self.name} did not answer within {limit_s:g} s; send the request again later",
            code=self._code,
            retry_after=RETRY_S,
        )

    def _submit(self, call: _Call) -> None:
        with self._changed:
            while self._waiting and self._waiting[0].given_up:
                self._waiting.popleft()
            if len(self._waiting) >= self._max_waiting:
                raise UnavailableError(
                    f"too many requests wait for the server's {self.name}; send the request again later",
                    code=self._code,
                    retry_after=RETRY_S,
                )
            self._waiting.append(call)
            if self._idle >= len(self._waiting):
                self._changed.notify()
                return
            if self._num_threads < self._most:
                self._start_thread(call)

    def _start_thread(self, call: _Call) -> None:
        self._num_threads += 1
        name = f"{self.name}-{self._num_threads}"
        try:
            threading.Thread(target=self._serve, name=name, daemon=True).start()
        except RuntimeError as error:
            self._num_threads -= 1
            if not self._num_threads:  # else another one takes the call
                call.given_up = True
                raise OSError(f"no thread for the server's {self.name}: {error}") from None

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._waiting:
                    self._changed.wait()
                self._idle -= 1
                call = self._waiting.popleft()
            call.perform()
            del call  # or the thread would hold what it made until its next call


DATABASE = Threads("database", 8, 5.0, "database_unavailable")
STRANGERS = Threads("check of keys", 1, 5.0, code="server_busy", max_waiting=256)
"""Looks up keys that have never been good here, so that a flood of wrong ones holds up no right one."""
FILES = Threads("file storage", 8, 30.0)
SOURCES = Threads("look at adapter sources", 4, 600.0)
PICTURES = Threads("reading of pictures", 2, 30.0)
"""Decodes pictures that come with requests, and bodies that hold them."""
UPKEEP = Threads("upkeep", 2, None)
"""What nobody waits for: cleaning up, the start, the end."""
