"""Threads by purpose: what hangs in one place holds up nothing else, and nobody for ever."""

from __future__ import annotations

import asyncio
import base64
import gc
import platform
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mezzotint import images
from mezzotint.errors import AuthenticationError, UnavailableError
from mezzotint.server import app as server
from mezzotint.server.api import a1111
from mezzotint.server.store import keys
from mezzotint.server.threads import MAX_HEAPS, OWNER, GivenUpError, Threads, require_caller
from mezzotint.server.work import adapters
from tests.attacks import attack
from tests.server.hosting import PATIENCE_S, client, hosting, settings_for

HEAPS = """
import ctypes, sys, threading
from mezzotint.server.threads import share_heaps
if sys.argv[1] == "share":
    share_heaps()
libc, together = ctypes.CDLL(None), threading.Barrier(9)
libc.malloc.restype = ctypes.c_void_p
def use():
    libc.malloc(4096)
    together.wait()
    together.wait()
for _ in range(8):
    threading.Thread(target=use).start()
together.wait()
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
together.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has a heap for each thread")
def test_threads_share_two_heaps() -> None:
    num = [
        subprocess.run(
            [sys.executable, "-c", HEAPS, how], capture_output=True, text=True, check=True
        ).stdout.count("<heap nr=")
        for how in ("alone", "share")
    ]
    assert num[0] > num[1]
    assert num[1] <= MAX_HEAPS


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What the work of a test hangs at; it opens at the end."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_work_comes_back_with_its_result_or_error() -> None:
    threads = Threads("test", 2, None)

    async def main() -> None:
        assert await asyncio.gather(*(threads.run(pow, 2, number) for number in range(9))) == [
            2**number for number in range(9)
        ]
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 1, 0)

    asyncio.run(main())


def test_finished_work_keeps_nothing_alive_until_the_next_collection() -> None:
    class Body:
        """What a request brought."""

    async def main() -> weakref.ref[Body]:
        body = Body()
        await Threads("test", 1, None).run(id, body)
        return weakref.ref(body)

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()


def test_who_waits_too_long_is_told_and_work_that_has_not_begun_never_does(gate: threading.Event) -> None:
    threads, begun = Threads("test", 1, 0.05), threading.Event()

    async def main() -> None:
        for work in (gate.wait, begun.set):
            with pytest.raises(UnavailableError, match=r"test did not answer within 0\.05 s") as caught:
                await threads.run(work)
            assert caught.value.code == "server_busy"
        gate.set()
        assert await threads.run(lambda: "again") == "again"

    asyncio.run(main())
    assert not begun.is_set()


def test_a_change_whose_caller_was_told_that_it_failed_does_not_happen(gate: threading.Event) -> None:
    threads, outcomes = Threads("test", 1, 0.05), list[str]()

    def change() -> None:
        gate.wait()
        try:
            require_caller()
            outcomes.append("done")
        except GivenUpError:
            outcomes.append("given up")

    async def main() -> None:
        with pytest.raises(UnavailableError):
            await threads.run(change)
        gate.set()
        await threads.run(lambda: None, limit_s=PATIENCE_S) if outcomes else None
        while not outcomes:
            await asyncio.sleep(0.001)

    asyncio.run(main())
    assert outcomes == ["given up"]


def test_too_many_that_wait_are_refused_at_once(gate: threading.Event) -> None:
    threads = Threads("test", 1, None, max_waiting=1)

    async def main() -> None:
        running = asyncio.ensure_future(threads.run(gate.wait))
        while not threads._num_threads or threads._waiting:
            await asyncio.sleep(0.001)
        waiting = asyncio.ensure_future(threads.run(gate.wait))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="too many requests wait"):
            await threads.run(gate.wait)
        gate.set()
        await asyncio.gather(running, waiting)

    asyncio.run(main())


def test_spare_threads_stand_in_for_lost_ones_and_end_when_those_come_back(gate: threading.Event) -> None:
    threads = Threads("test", 2, PATIENCE_S, spare=2)

    async def lose(owner: str) -> None:
        OWNER.set(owner)
        with pytest.raises(UnavailableError, match="did not answer"):
            await threads.run(gate.wait, limit_s=0.3)

    async def use(owner: str) -> str:
        OWNER.set(owner)
        return await threads.run(lambda: "used")

    async def main() -> None:
        await asyncio.gather(lose("bad"), lose("bad"))
        with pytest.raises(UnavailableError, match="2 requests of this key keep the server's test busy"):
            await use("bad")
        assert await use("good") == "used"
        await asyncio.gather(lose("worse"), lose("worse"))
        with pytest.raises(UnavailableError, match="all 4 threads"):
            await use("good")
        gate.set()
        async with asyncio.timeout(PATIENCE_S):
            while threads._lost:
                await asyncio.sleep(0.001)
        assert [await use(each) for each in ("good", "bad")] == ["used"] * 2
        assert threads._num_threads == 2

    asyncio.run(main())


@attack("Pictures whose decoding never ends", outcome="503 for this key; other keys' pictures are read")
def test_pictures_that_hang_hold_up_their_own_key_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    monkeypatch.setattr(a1111, "PNG_INFO_S", 0.3)
    pictures = Threads("reading of pictures", 2, PATIENCE_S, spare=2)
    monkeypatch.setattr(a1111, "PICTURES", pictures)
    monkeypatch.setattr(
        images, "read_infotext", lambda data: gate.wait() and None if b"bad" in data else None
    )
    path = "/sdapi/v1/png-info"
    bad, good = ({"image": base64.b64encode(text).decode()} for text in (b"bad", b"good"))
    with hosting(settings_for(tmp_path)) as host, host.new_client() as other:
        for answer in [host.pool.submit(host.client.post, path, json=bad) for _ in range(8)]:
            assert answer.result(PATIENCE_S).json()["error"]["code"] == "server_busy"
        assert other.post(path, json=good).status_code == 200
        refused = host.client.post(path, json=good)
        assert refused.status_code == 503
        assert "this key" in refused.json()["error"]["message"]
        gate.set()
        host.until(lambda: not pictures._lost)
        assert host.client.post(path, json=good).status_code == 200


@attack("Six adapter sources that never answer", outcome="requests go on, and SIGTERM ends the server")
def test_adapter_sources_that_hang_hold_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    asked = threading.Semaphore(0)

    def hang(*_: object) -> None:
        asked.release()
        gate.wait()

    monkeypatch.setattr(server, "LAST_WORDS_S", 0)
    monkeypatch.setattr(adapters, "SOURCES", Threads("sources", 4, None))
    monkeypatch.setattr(adapters, "copy_source", hang)
    with hosting(settings_for(tmp_path)) as host:
        path = "/dedicated/beta/endpoint/one/adapters"
        adds = [
            host.pool.submit(host.client.post, path, json={"route": f"r{number}", "source": "/slow"})
            for number in range(6)
        ]
        for _ in range(4):
            assert asked.acquire(timeout=PATIENCE_S)
        assert host.post().status_code == 200
        assert host.client.get(path).status_code == 200
        for each in adds:
            assert not each.done()
        host.client.close()
        host.pool.shutdown(wait=False, cancel_futures=True)
    # `hosting` has seen the server end, although the sources hang still


@attack("A flood of wrong keys", outcome="waits in a queue of its own; keys that were right before do not")
def test_wrong_keys_hold_up_no_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    right = keys.authenticate

    def slow(engine: sa.Engine, secret: str) -> keys.Key:
        if "wrong" in secret:
            gate.wait()
            raise AuthenticationError("wrong")
        return right(engine, secret)

    with hosting(settings_for(tmp_path)) as host:
        assert host.post().status_code == 200
        monkeypatch.setattr(keys, "authenticate", slow)

        def guess(number: int) -> int:
            with client(host.url, f"mz_wrong-{number}") as stranger:
                return stranger.get("/v1/models").status_code

        guesses = [host.pool.submit(guess, number) for number in range(20)]
        assert host.post().status_code == 200
        gate.set()
        assert {each.result(PATIENCE_S) for each in guesses} == {401}
