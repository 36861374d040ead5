"""What is kept of ended requests, key by key: without event loop or network."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from mezzotint.errors import RateLimitError
from mezzotint.messages import Generate
from mezzotint.server.store.keys import Key
from mezzotint.server.store.spool import Spool
from mezzotint.server.work import tickets as module
from mezzotint.server.work.queueing import Job
from mezzotint.server.work.tickets import RECORD_BYTES, Answer, Ticket, Tickets
from mezzotint.spec import ImageSpec
from tests.attacks import attack

TTL_S = 600.0
NUMBERS = itertools.count()


@pytest.fixture
def tickets(monkeypatch: pytest.MonkeyPatch) -> Tickets:
    """Each key may hold about 100 records in memory, and 1,000 bytes on disk."""
    monkeypatch.setattr(module, "MAX_MEMORY_BYTES", 100 * RECORD_BYTES)
    monkeypatch.setattr(module, "ANSWER_MEMORY_BYTES", 50 * RECORD_BYTES)
    monkeypatch.setattr(module, "MAX_DISK_BYTES", 1000)
    return Tickets(TTL_S)


def ended(
    tickets: Tickets,
    key_id: str,
    now: float = 0.0,
    *,
    held: bool = False,
    idempotency_key: str | None = None,
    clients: int = 0,
    answer: Answer | None = None,
) -> Ticket:
    """A request of this key that has just ended."""
    ticket = Ticket(
        f"request-{next(NUMBERS)}", Key(key_id, key_id), cast(Any, None), None, "print", idempotency_key, 0.0
    )
    message = Generate("job", ImageSpec(prompt="x", num_inference_steps=1, seed=1))
    nothing = cast(Any, None)
    ticket.jobs = [Job(message, key_id, 1.0, 0, 1.0, 0.0, nothing, nothing, nothing)]
    ticket.status, ticket.answer = "done", answer or Answer(b"{}")
    ticket.held, ticket.clients = held, clients
    tickets.add(ticket)
    tickets.keep(ticket, now)
    return ticket


@attack("One key's traffic against another key's stored results", outcome="they stay for idempotency_ttl_s")
def test_one_keys_traffic_forgets_nothing_that_another_key_was_promised(tickets: Tickets) -> None:
    result = ended(tickets, "quiet", held=True)
    answered = ended(tickets, "quiet", idempotency_key="once")
    for number in range(500):
        ended(tickets, "busy", idempotency_key=str(number))
        ended(tickets, "busy", answer=Answer(bytes(RECORD_BYTES)))
    assert tickets.by_id[result.id].answer == Answer(b"{}")
    assert tickets.by_idempotency["quiet", "once"] is answered
    tickets.require_room("quiet", 1.0)


def test_a_key_keeps_what_it_was_promised_and_is_refused_more(tickets: Tickets) -> None:
    promised: list[Ticket] = []

    def go_on() -> None:
        while len(promised) < 1000:
            tickets.require_room("busy", 10.0)
            promised.append(ended(tickets, "busy", 10.0, idempotency_key=str(len(promised))))
            ended(tickets, "busy", 10.0)

    with pytest.raises(RateLimitError, match="finished requests of this key hold") as refused:
        go_on()
    assert 90 <= len(promised) <= 110
    assert all(tickets.by_id[ticket.id].answer is not None for ticket in promised)
    assert (refused.value.code, refused.value.retry_after) == ("too_many_answers", TTL_S)
    tickets.require_room("busy", 10.0 + TTL_S)


def test_what_was_not_promised_makes_room(tickets: Tickets) -> None:
    old = ended(tickets, "busy")
    for _ in range(200):
        ended(tickets, "busy")
        tickets.require_room("busy", 1.0)
    assert old.id not in tickets.by_id
    assert len(tickets.by_id) <= 100


@attack("Answers that are never read to their end", outcome="count against their key until then")
def test_answers_that_nobody_reads_count_until_they_are_read(tickets: Tickets) -> None:
    """Also those of requests that are no longer remembered."""
    unread = ended(tickets, "slow", clients=1, answer=Answer(bytes(101 * RECORD_BYTES)))
    with pytest.raises(RateLimitError):
        tickets.require_room("slow", 2 * TTL_S)
    assert unread.answer is not None
    unread.clients = 0
    tickets.drop_answer(unread)
    tickets.require_room("slow", 2 * TTL_S)
    assert tickets.num_bytes == 0


def test_answers_on_disk_have_a_bound_of_their_own(tickets: Tickets, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert tickets.fits_memory("busy", 50 * RECORD_BYTES)
    assert not tickets.fits_memory("busy", 50 * RECORD_BYTES + 1)
    for _ in range(2):
        tickets.require_room("busy", 0.0)
        ended(tickets, "busy", held=True, answer=Answer(spool.write(bytes(501))))
    with pytest.raises(RateLimitError):
        tickets.require_room("busy", 0.0)
    tickets.sweep(TTL_S)
    assert (tickets.num_bytes, tickets.by_id) == (0, {})


def test_a_promise_made_after_the_end_is_kept_too(tickets: Tickets) -> None:
    late = ended(tickets, "busy")
    late.held = True
    for _ in range(200):
        ended(tickets, "busy")
    assert tickets.by_id[late.id] is late


# ---------------------------------------------------------------- on disk


def test_what_is_spooled_is_read_back_piece_by_piece(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    contents = [bytes([number]) * (1000 + number) for number in range(50)]
    with ThreadPoolExecutor(4) as pool:
        spooled = list(pool.map(spool.write, contents))
    assert list(tmp_path.iterdir()) == [], "the files have no names"
    for content, kept in zip(contents, spooled, strict=True):
        assert len(kept) == len(content)
        assert kept.read(0, 900) + kept.read(900, 900) == content


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_spools_file_ends_with_the_last_bytes_that_somebody_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mezzotint.server.store.spool.SEGMENT_BYTES", 10)
    spool, before = Spool(tmp_path), open_files()
    kept = [spool.write(bytes(10)) for _ in range(20)]
    assert open_files() == before + 20
    del kept
    assert open_files() == before + 1, "the newest file is still being filled"
