"""Clients that do not read their answers, and what requests leave behind in memory."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mezzotint.server.api.a1111 import MAX_ECHOED
from mezzotint.server.work import tickets
from tests.attacks import attack
from tests.server.hosting import Host, endpoint, hosting, settings_for

SIDE = 1024
BIG: dict[str, Any] = {
    "width": SIDE,
    "height": SIDE,
    "num_inference_steps": 1,
    "response_format": "raw",
    "n": 4,
}
BIG_BYTES = 4 * SIDE * SIDE * 3 * 4 // 3
"""Base64 of four pictures."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    settings = settings_for(
        tmp_path_factory.mktemp("server"),
        endpoint("fake:step_s=0.001", max_pixels=SIDE * SIDE),
        send_timeout_s=2,
    )
    with hosting(settings) as running:
        yield running


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def send_unread(host: Host, stack: contextlib.ExitStack, key: str) -> socket.socket:
    """A request whose answer is not read: its connection takes as little as the kernel allows."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    url = host.client.base_url
    raw.connect((url.host, url.port or 80))
    stack.callback(raw.close)
    head, _, body = host.raw_post(**BIG).partition(b"\r\n\r\n")
    raw.sendall(head + f"\r\nIdempotency-Key: {key}".encode() + b"\r\n\r\n" + body)
    return raw


@attack(
    "Clients that never read, under one Idempotency-Key",
    outcome="one answer in memory; dropped after send_timeout_s",
)
def test_many_who_do_not_read_one_answer_hold_one_answer_and_are_dropped(host: Host) -> None:
    answer = host.post(**BIG, headers={"idempotency-key": "one for all"})
    ticket = host.service.admission.tickets.by_id[answer.json()["id"]]
    before = resident_mib()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            send_unread(host, stack, "one for all")
        host.until(lambda: ticket.clients == 20)
        held: list[float] = []

        def all_dropped() -> bool:
            held.append(resident_mib() - before)
            return ticket.clients == 0

        host.until(all_dropped)  # send_timeout_s is 2
    assert max(held) < 5 * BIG_BYTES / 2**20, "20 answers of 16 MiB would be 320 MiB"


def test_an_answer_that_went_to_disk_is_the_same_in_every_way_of_asking(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets, "ANSWER_MEMORY_BYTES", 0)
    headers = {"idempotency-key": "to disk"}
    first = host.post("on disk", **BIG, headers=headers)
    ticket = host.service.admission.tickets.by_id[first.json()["id"]]
    assert ticket.answer is not None
    assert ticket.answer.on_disk
    assert host.post("on disk", **BIG, headers=headers).content == first.content
    state = host.state(ticket.id)
    assert state["result"] == first.json()
    with host.client.stream("GET", f"/dedicated/v1/requests/{ticket.id}/events") as answer:
        assert answer.read() == b"event: done\ndata: " + first.content + b"\n\n"


def test_a_stream_of_openais_that_went_to_disk_ends_as_it_should(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "one", "prompt": "x", "seed": 1, "steps": 1, "stream": True, "size": f"{SIDE}x{SIDE}"}
    answers = []
    for most in (tickets.ANSWER_MEMORY_BYTES, 0):
        monkeypatch.setattr(tickets, "ANSWER_MEMORY_BYTES", most)
        text = host.client.post("/v1/images/generations", json=body).text
        (event,) = [part for part in text.split("\n\n") if "image_generation.completed" in part]
        answers.append(json.loads(event.partition("data: ")[2])["b64_json"])
    assert answers[0] == answers[1]


@attack("A disk that fills while answers are spooled", outcome="no answer is lost")
def test_a_disk_that_takes_no_more_loses_no_answer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tickets, "ANSWER_MEMORY_BYTES", 0)
    monkeypatch.setattr(host.service.admission._spool, "write", full)
    assert host.picture("in memory all the same")


@attack("Filling memory with answers that nobody fetches", outcome="429 for this key alone")
def test_a_key_whose_answers_hold_too_much_is_told_so_and_no_other_key(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with host.new_client() as busy:
        host_body = host.body("mine")
        url = "/dedicated/v1/images/generations"
        assert busy.post(url, json=host_body, headers={"idempotency-key": "a"}).status_code == 200
        monkeypatch.setattr(tickets, "MAX_MEMORY_BYTES", tickets.RECORD_BYTES)
        refused = busy.post(url, json=host_body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_answers")
        assert int(refused.headers["retry-after"]) > 500
        again = busy.post(url, json=host_body, headers={"idempotency-key": "a"})
        assert again.status_code == 200, "what was promised is still there"
        with host.new_client() as other:
            assert other.post(url, json=host_body).status_code == 200


@attack("Bodies of a MiB with requests that end at once", outcome="nothing of them is kept")
def test_an_ended_request_of_a1111_leaves_nothing_of_its_body(host: Host) -> None:
    """23 MiB were kept for a body of 0.94 MiB, ten minutes long."""
    body = {"prompt": "a fox", "steps": 1, "junk": [[number] for number in range(100_000)]}
    assert len(json.dumps(body)) > 10 * MAX_ECHOED
    known = set(host.service.admission.tickets.by_id)
    with host.new_client() as http:
        answer = http.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["parameters"] == {"prompt": "a fox", "steps": 1}
    (request_id,) = set(host.service.admission.tickets.by_id) - known
    ticket = host.service.admission.tickets.by_id[request_id]
    assert ticket.finish is None, "it holds what the answer is made of"
