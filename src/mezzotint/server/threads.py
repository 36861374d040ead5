"""Threads by purpose: what is slow in one place holds up nothing else, and nothing here holds up the end.

The threads are daemons, because a source or a database that hangs can be interrupted by nobody. Who waits for
one is told after a limit; the thread is lost to its purpose until the call comes back. Where a purpose has
spare threads, another thread takes its place meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

from mezzotint.errors import MezzotintError, UnavailableError

Result = TypeVar("Result")
RETRY_S = 5.0
MAX_HEAPS = 2
_M_ARENA_MAX = -8
"""Of malloc.h."""


@dataclass(slots=True, eq=False)
class _Call:
    """One piece of work; whoever waits for it sets `given_up`."""

    work: Callable[[], Any]
    deliver: Callable[[Any, BaseException | None], None]
    owner: str
    given_up: bool = False
    running: bool = False
    lost: bool = False
    """Its thread works on although nobody waits. `Threads` sets this and `running` under its lock."""

    def perform(self) -> None:
        if self.given_up:
            return
        try:
            result = self.work()
        except BaseException as error:  # raised again where it is waited for
            self.deliver(None, error)
        else:
            self.deliver(result, None)


def _nothing() -> None:
    """The work of a call that nobody waits for."""


OWNER: ContextVar[str] = ContextVar("owner", default="")
"""The id of the key that the running request came with."""
_current: ContextVar[_Call | None] = ContextVar("current", default=None)


class GivenUpError(Exception):
    """Nobody waits for this work any more, so it changes nothing."""


def require_caller() -> None:
    """GivenUpError in work whose caller has been told that it was not done; a transaction then rolls back."""
    call = _current.get()
    if call is not None and call.given_up:
        raise GivenUpError


def share_heaps() -> None:
    """Lets all threads share MAX_HEAPS of glibc's heaps; elsewhere it does nothing.

    With a heap for each thread, what one has freed is of no use to another, and memory grows by that.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, MAX_HEAPS)


class Threads:
    """Runs blocking calls, `most` at once, for one purpose."""

    def __init__(
        self,
        name: str,
        most: int,
        limit_s: float | None,
        code: str = "server_busy",
        max_waiting: int = 4096,
        spare: int = 0,
    ) -> None:
        """`limit_s` is how long a caller waits, its turn included; None is for ever.

        `name` says in the error what did not answer. More than `max_waiting` calls are refused at once.
        Up to `spare` threads stand in for lost ones. With them, a key that has lost `most` threads is refused
        until one comes back, and so is everybody while all threads are lost.
        """
        self.name = name
        self.limit_s = limit_s
        self._most = most
        self._code = code
        self._max_waiting = max_waiting
        self._spare = spare
        self._waiting: deque[_Call] = deque()
        self._idle = 0
        self._num_threads = 0
        self._lost: Counter[str] = Counter()
        """By owner: threads that work on although nobody waits."""
        self._changed = threading.Condition()
        """Guards the four above."""

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
        call = _Call(_nothing, post, OWNER.get())
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
            self._give_up(call, lost=not future.done())
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
                raise self._refusal(f"too many requests wait for the server's {self.name}")
            refusal = self._refusal_of(call.owner)
            if refusal is not None:
                raise refusal
            self._waiting.append(call)
            if self._idle >= len(self._waiting):
                self._changed.notify()
                return
            if self._num_threads < self._wanted():
                self._start_thread(call)

    def _refusal_of(self, owner: str) -> MezzotintError | None:
        """Why a call of this owner gets no thread, asked when it comes and when its turn comes."""
        num, most = self._lost[owner], self._most + self._spare
        if self._spare and num >= self._most:
            text = f"{num} requests of this key keep the server's {self.name} busy past their time"
            return self._refusal(f"{text}, and {self._most} may")
        if self._spare and self._lost.total() >= most:
            return self._refusal(f"all {most} threads of the server's {self.name} are busy past their time")
        return None

    def _refusal(self, text: str) -> MezzotintError:
        return UnavailableError(f"{text}; send the request again later", code=self._code, retry_after=RETRY_S)

    def _wanted(self) -> int:
        return self._most + min(self._lost.total(), self._spare)

    def _give_up(self, call: _Call, lost: bool) -> None:
        """Nobody waits for this call; if its thread is lost to it, another one may take its place."""
        with self._changed:
            call.given_up = True
            call.work = _nothing  # its context names the call, so the two would keep each other
            if not (lost and call.running):
                return
            call.lost = True
            self._lost[call.owner] += 1
            waiting = next((each for each in self._waiting if not each.given_up), None)
            if waiting is not None and not self._idle and self._num_threads < self._wanted():
                with contextlib.suppress(OSError):  # the others wait longer
                    self._start_thread(waiting)

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
                call.running = True
                refusal = self._refusal_of(call.owner)
            if refusal is None:
                call.perform()
            else:
                call.deliver(None, refusal)
            with self._changed:
                call.running = False
                if call.lost:
                    self._lost -= Counter([call.owner])  # keeps no zeros
                    if self._num_threads > self._wanted():
                        self._num_threads -= 1
                        return
            del call  # or the thread would hold what it made until its next call


DATABASE = Threads("database", 8, 5.0, "database_unavailable")
STRANGERS = Threads("check of keys", 1, 5.0, code="server_busy", max_waiting=256)
"""Looks up keys that have never been good here, so that a flood of wrong ones holds up no right one."""
FILES = Threads("file storage", 8, 30.0)
GALLERY = Threads("gallery", 1, 5.0, "database_unavailable")
"""Enters stored pictures into the gallery."""
SOURCES = Threads("look at adapter sources", 4, 600.0)
PICTURES = Threads("reading of pictures", 2, 30.0, spare=14)
"""Decodes pictures that come with requests, and bodies that hold them."""
UPKEEP = Threads("upkeep", 2, None)
"""What nobody waits for: cleaning up, the start, the end."""
