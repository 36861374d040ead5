"""Threads by purpose: what hangs in one place holds up nothing else, and nobody for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mezzotint.errors import AuthenticationError, UnavailableError
from mezzotint.server import app as server
from mezzotint.server.store import keys
from mezzotint.server.threads import GivenUpError, Threads, require_caller
from mezzotint.server.work import adapters
from tests.attacks import attack
from tests.server.hosting import PATIENCE_S, client, hosting, settings_for


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
