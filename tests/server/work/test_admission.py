"""Clients that give up and come back, deadlines, full queues, one's own requests: over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest

from mezzotint.messages import Done
from mezzotint.server.api.disconnect import or_gone
from mezzotint.server.store import keys
from mezzotint.server.store.keys import Limits
from mezzotint.server.work.lifecycle import State
from mezzotint.server.work.queueing import Throughput
from mezzotint.server.work.tickets import ClientGone, Ticket
from tests.attacks import attack
from tests.server.hosting import GENERATE, PATIENCE_S, Host, endpoint, hosting, settings_for

OPENAI = "/v1/images/generations"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One step takes 30 ms, so 50 steps take longer than the window for coming back."""
    settings = settings_for(
        tmp_path_factory.mktemp("server"), endpoint("fake:step_s=0.03"), attach_window_s=0.8
    )
    with hosting(settings) as running:
        yield running


def hang_up(host: Host, **fields: object) -> str:
    """Sends a request, waits until it runs, and drops the connection; its id."""
    known = set(host.service.admission.tickets.by_id)
    with host.connect() as raw:
        raw.sendall(host.raw_post(**fields))
        host.until(lambda: set(host.service.admission.tickets.by_id) - known)
        (request_id,) = set(host.service.admission.tickets.by_id) - known
        host.wait_until(request_id, "running")
    return request_id


def join_and_hang_up(host: Host, request_id: str, **fields: object) -> None:
    """Joins a request that was left, and leaves it once more."""
    ticket = host.service.admission.tickets.by_id[request_id]
    host.until(lambda: ticket.clients == 0)
    with host.connect() as raw:
        raw.sendall(host.raw_post(**fields))
        host.until(lambda: ticket.clients == 1)
    host.until(lambda: ticket.clients == 0)


# ---------------------------------------------------------------- give up and come back


def test_a_client_that_comes_back_gets_the_job_it_left(host: Host) -> None:
    left = hang_up(host, prompt="back again", num_inference_steps=30)
    answer = host.post("back again", num_inference_steps=30)
    assert answer.status_code == 200
    assert answer.json()["id"] == left


@attack("Sending requests and hanging up", outcome="cancelled within a step")
def test_nobody_comes_back_and_the_job_is_cancelled_within_a_step(host: Host) -> None:
    left = hang_up(host, prompt="never again", num_inference_steps=50)
    state = host.wait_until(left, "cancelled")
    assert state["step"] < 50
    answer = host.post("never again", num_inference_steps=5)
    assert answer.json()["id"] != left
    host.post()  # the worker has obeyed by the time it has done another job
    assert host.endpoint().dispatcher.num_running() == 0


def test_a_second_leaving_opens_a_second_window(host: Host) -> None:
    first = hang_up(host, prompt="to and fro", num_inference_steps=50)
    join_and_hang_up(host, first, prompt="to and fro", num_inference_steps=50)
    assert host.post("to and fro", num_inference_steps=50).json()["id"] == first


def test_a_live_connection_is_never_joined(host: Host) -> None:
    running = [host.post_soon("twins", num_inference_steps=20) for _ in range(2)]
    answers = [one.result().json() for one in running]
    assert answers[0]["id"] != answers[1]["id"]
    assert answers[0]["data"][0]["seed"] != answers[1]["data"][0]["seed"]


def test_only_the_identical_body_under_the_same_key_joins(host: Host) -> None:
    left = hang_up(host, prompt="mine", num_inference_steps=30)
    assert host.post("mine", num_inference_steps=31).json()["id"] != left
    with host.new_client() as other:
        answer = other.post(GENERATE, json=host.body("mine", num_inference_steps=30))
        assert answer.json()["id"] != left


# ---------------------------------------------------------------- at the same moment


@pytest.fixture(scope="module")
def open_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A server without keys, whose requests wait for no thread before they are admitted."""
    settings = settings_for(
        tmp_path_factory.mktemp("server"), endpoint("fake:step_s=0.03"), attach_window_s=0.8, auth=False
    )
    with hosting(settings) as running:
        yield running


@contextlib.contextmanager
def standing_still(host: Host) -> Iterator[None]:
    """The server's event loop stops while the block runs, and finds all that came meanwhile at once."""
    stopped, go_on = threading.Event(), threading.Event()

    def stand_still() -> None:
        stopped.set()
        go_on.wait(PATIENCE_S)

    host.loop.call_soon_threadsafe(stand_still)
    assert stopped.wait(PATIENCE_S)
    try:
        yield
    finally:
        go_on.set()


class Connection(HTTPConnection):
    """A connection that the server has accepted."""

    def __init__(self, host: Host) -> None:
        url = httpx2.URL(host.url)
        super().__init__(url.host, url.port, timeout=PATIENCE_S)
        self._headers = {"content-type": "application/json"}
        if "authorization" in host.client.headers:
            self._headers["authorization"] = host.client.headers["authorization"]
        self.request("GET", "/healthz")
        assert self.getresponse().read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def post(self, body: dict[str, Any], path: str = GENERATE) -> None:
        self.request("POST", path, json.dumps(body), self._headers)

    def answer(self) -> bytes:
        response = self.getresponse()
        assert response.status == 200
        return response.read()


def tickets_for(host: Host, prompt: str) -> list[Ticket]:
    """The requests with this prompt, once there is one."""

    def found() -> list[Ticket]:
        tickets = list(host.service.admission.tickets.by_id.values())
        return [one for one in tickets if one.jobs[0].spec.prompt == prompt]

    host.until(found)
    return found()


@attack("Hanging up and sending the same again, at once", outcome="one request runs")
@pytest.mark.parametrize("with_keys", [False, True])
def test_a_hang_up_and_the_same_request_again_heard_at_once_are_one_request(
    host: Host, open_host: Host, with_keys: bool
) -> None:
    """A server that was busy finds the request, its end and the next one together."""
    host = host if with_keys else open_host
    body = host.body("at once", num_inference_steps=30)
    with Connection(host) as first, Connection(host) as second:
        with standing_still(host):
            first.post(body)
            first.close()
            second.post(body)
        assert second.answer()
    assert len(tickets_for(host, "at once")) == 1


def test_a_streams_hang_up_and_the_same_request_again_heard_at_once_are_one_request(open_host: Host) -> None:
    body = {"model": "one", "prompt": "at once, streamed", "steps": 30, "stream": True}
    with Connection(open_host) as first, Connection(open_host) as second:
        with standing_still(open_host):
            first.post(body, OPENAI)
            first.close()
            second.post(body, OPENAI)
        assert b"image_generation.completed" in second.answer()
    assert len(tickets_for(open_host, "at once, streamed")) == 1


def test_a_request_that_is_looked_at_after_its_client_came_back_is_not_run(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are looked up in threads, so the second may be through before the first."""
    go_on, real = threading.Event(), keys.authenticate
    slow_ones = [go_on]

    def authenticate(*values: Any) -> keys.Key:
        if slow_ones:
            slow_ones.pop().wait(PATIENCE_S)
        return real(*values)

    monkeypatch.setattr(keys, "authenticate", authenticate)
    body = host.body("overtaken", num_inference_steps=50)
    with Connection(host) as first, Connection(host) as second:
        first.post(body)
        host.until(lambda: not slow_ones)
        first.close()
        second.post(body)
        assert len(tickets_for(host, "overtaken")) == 1
        go_on.set()
        assert second.answer()
    assert len(tickets_for(host, "overtaken")) == 1


def test_a_client_that_hangs_up_before_its_stream_begins_has_hung_up(open_host: Host) -> None:
    with Connection(open_host) as gone, standing_still(open_host):
        gone.post({"model": "one", "prompt": "gone", "steps": 50, "stream": True}, OPENAI)
        gone.close()
    (ticket,) = tickets_for(open_host, "gone")
    open_host.until(lambda: ticket.ended)
    assert ticket.status == "cancelled"


def test_an_answer_that_comes_with_the_hang_up_has_not_been_delivered() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def answer() -> str:
        return "nobody reads this"

    let_go = []

    @contextlib.contextmanager
    def attached() -> Iterator[None]:
        try:
            yield
        except ClientGone:
            let_go.append("gone")
            raise

    async def main() -> None:
        with attached():
            await or_gone(receive, answer())

    with pytest.raises(ClientGone):
        asyncio.run(main())
    assert let_go == ["gone"]


# ---------------------------------------------------------------- idempotency keys


def test_an_idempotency_key_finds_the_running_and_the_finished_request(host: Host) -> None:
    headers = {"idempotency-key": "once"}
    running = [host.pool.submit(host.post, "once", headers=headers, num_inference_steps=20) for _ in range(4)]
    answers = [one.result() for one in running]
    assert len({answer.content for answer in answers}) == 1
    assert host.post("once", headers=headers, num_inference_steps=20).content == answers[0].content


@attack("An Idempotency-Key again, with another body", outcome="409")
def test_an_idempotency_key_with_another_body_is_a_conflict(host: Host) -> None:
    headers = {"idempotency-key": "twice"}
    assert host.post("one thing", headers=headers).status_code == 200
    answer = host.post("another thing", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")


@attack("Another key's Idempotency-Key", outcome="finds nothing")
def test_an_idempotency_key_of_somebody_else_is_somebody_elses(host: Host) -> None:
    headers = {"idempotency-key": "shared"}
    mine = host.post("a", headers=headers)
    with host.new_client() as other:
        theirs = other.post(GENERATE, json=host.body("a"), headers=headers)
    assert mine.json()["id"] != theirs.json()["id"]


def test_a_failed_request_is_run_again_under_its_idempotency_key(host: Host, tmp_path: Path) -> None:
    headers = {"idempotency-key": "try again", "x-request-timeout-s": "0.2"}
    assert host.post("slow", headers=headers, num_inference_steps=5).status_code in (200, 504)
    headers = {"idempotency-key": "fails"}
    assert host.post("x !fail@1", headers=headers).status_code == 500
    first = host.post("x !fail@1", headers=headers)
    assert first.status_code == 500
    assert first.headers["x-request-id"] == first.json()["request_id"]


# ---------------------------------------------------------------- deadlines and full queues


def test_a_request_that_cannot_meet_its_deadline_is_refused_at_once(host: Host) -> None:
    began = time.monotonic()
    answer = host.post(headers={"x-request-timeout-s": "0.1"}, num_inference_steps=50)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - began < 1.0


def test_a_request_that_no_longer_can_is_ended_with_504(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        answer = host.post("a !hang@2", headers={"x-request-timeout-s": "0.3"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "at step" in answer.json()["detail"]


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan", "3601", ""])
def test_a_bad_timeout_header_is_422(host: Host, text: str) -> None:
    answer = host.post(headers={"x-request-timeout-s": text})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "X-Request-Timeout-S")


def test_a_full_queue_is_429_with_a_truthful_retry_after(tmp_path: Path) -> None:
    spec = endpoint("fake:step_s=0.02", max_queue_s=2, batching="off", max_jobs=1)
    with hosting(settings_for(tmp_path, spec)) as host:
        admitted, refused = [], None
        for number in range(40):
            answer = host.post(f"job {number}", headers={"prefer": "respond-async"}, num_inference_steps=24)
            if answer.status_code == 429:
                refused = answer
                break
            admitted.append(answer.json()["id"])
        assert refused is not None
        assert len(admitted) >= 2
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 2
        for request_id in admitted:
            host.wait_until(request_id, "done")


@attack("One key fills the queue", outcome="other keys still get in")
def test_a_full_queue_of_one_key_is_not_full_for_another(tmp_path: Path) -> None:
    spec = endpoint("fake:step_s=0.005", max_queue_s=3, batching="off")
    with hosting(settings_for(tmp_path, spec)) as host:
        for number in range(200):
            answer = host.post(f"job {number}", headers={"prefer": "respond-async"}, num_inference_steps=50)
            if answer.status_code == 429:
                break
        assert answer.status_code == 429
        with host.new_client() as other:
            answer = other.post(GENERATE, json=host.body("mine", num_inference_steps=4))
            assert answer.status_code == 200
        assert len(host.endpoint().dispatcher.queue) > 0, "the other key's jobs still wait"


def test_weights_come_from_the_key(host: Host) -> None:
    with host.new_client(limits=Limits(weight=3.0)) as heavy:
        assert heavy.post(GENERATE, json=host.body()).status_code == 200


def test_a_key_of_higher_priority_goes_first_and_its_workers_are_told(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.005", batching="off"))) as host:
        common = [host.submit(f"job {number}", num_inference_steps=50) for number in range(12)]
        with host.new_client(limits=Limits(priority=3)) as paying:
            paid = []
            for number in range(3):
                body, headers = (
                    host.body(f"paid {number}", num_inference_steps=50),
                    {"prefer": "respond-async"},
                )
                paid.append(paying.post(GENERATE, json=body, headers=headers).json()["id"])
        known = host.service.admission.tickets.by_id
        tickets = [known[request_id] for request_id in (*common, *paid)]
        assert {ticket.jobs[0].request.priority for ticket in tickets[:12]} == {0}
        assert {ticket.jobs[0].request.priority for ticket in tickets[12:]} == {3}
        waiting = [ticket for ticket in tickets if ticket.status == "queued"]
        order: list[str] = []
        host.run(ended_in_order(tickets, tickets[-1], order))
        assert len(waiting) > 6, "most of the others must still be waiting"
        assert len(order) <= 6, "at most the two that ran, and one that shared a worker's step"


# ---------------------------------------------------------------- one's own requests


def test_a_request_can_be_followed_to_its_result(host: Host) -> None:
    request_id = host.submit("watched", num_inference_steps=10, seed=3)
    state = host.wait_until(request_id, "done")
    assert (state["step"], state["num_steps"]) == (10, 10)
    assert state["result"]["data"][0]["b64_json"] == host.picture("watched", num_inference_steps=10, seed=3)


def test_queued_requests_know_their_position_and_time(tmp_path: Path) -> None:
    spec = endpoint("fake:step_s=0.02", batching="off", max_jobs=1)
    with hosting(settings_for(tmp_path, spec)) as host:
        ids = [host.submit(f"job {number}", num_inference_steps=50) for number in range(4)]
        states = [host.state(request_id) for request_id in ids[1:]]
        assert [state["position"] for state in states] == [0, 1, 2]
        assert all(state["status"] == "queued" for state in states)
        assert states[0]["seconds_left"] < states[2]["seconds_left"]
        for request_id in ids:
            assert host.client.delete(f"/dedicated/v1/requests/{request_id}").json()["status"] == "cancelled"


@attack("Another key's request by its ID, as admin too", outcome="404")
def test_a_request_is_visible_to_its_key_and_to_nobody_else(host: Host) -> None:
    request_id = host.submit("private")
    with host.new_client(admin=True) as other:
        for method, tail in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            answer = other.request(method, f"/dedicated/v1/requests/{request_id}{tail}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")
    host.wait_until(request_id, "done")


def test_delete_cancels_within_a_step_and_the_waiting_client_is_told(host: Host) -> None:
    headers = {"idempotency-key": "to be cancelled"}
    waiting = host.pool.submit(host.post, "cancel me", headers=headers, num_inference_steps=50)
    request_id = host.submit("cancel me", headers=headers, num_inference_steps=50)
    host.wait_until(request_id, "running")
    began = time.monotonic()
    state = host.client.delete(f"/dedicated/v1/requests/{request_id}").json()
    assert state["status"] == "cancelled"
    assert waiting.result().status_code == 499
    assert time.monotonic() - began < 2
    again = host.client.delete(f"/dedicated/v1/requests/{request_id}")
    assert again.json()["status"] == "cancelled"


def events(host: Host, request_id: str) -> list[tuple[str, dict[str, Any]]]:
    with host.client.stream("GET", f"/dedicated/v1/requests/{request_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    found = re.findall(r"event: (\w+)\ndata: (.*)\n", text)
    return [(name, json.loads(data)) for name, data in found]


def test_events_tell_the_progress_the_previews_and_the_end(host: Host) -> None:
    headers = {"prefer": "respond-async, previews=2"}
    request_id = host.submit("told", headers=headers, num_inference_steps=12, seed=1)
    told = events(host, request_id)
    names = [name for name, _ in told]
    assert names.count("preview") == 2
    assert names[-1] == "done"
    assert set(names) == {"progress", "preview", "done"}
    steps = [data["step"] for name, data in told if name == "progress"]
    assert steps == sorted(steps)
    assert told[-1][1]["data"] == host.state(request_id)["result"]["data"]


def test_events_of_a_failed_and_of_a_cancelled_request_end_so(host: Host) -> None:
    failed = events(host, host.submit("x !fail@2"))
    assert failed[-1][0] == "failed"
    assert failed[-1][1]["error"]["code"] == "generation_failed"
    request_id = host.submit("long", num_inference_steps=50)
    watching = host.pool.submit(events, host, request_id)
    host.wait_until(request_id, "running")
    host.client.delete(f"/dedicated/v1/requests/{request_id}")
    assert watching.result()[-1][0] == "cancelled"


def test_a_watcher_sees_its_place_change_and_gets_the_answer_too(tmp_path: Path) -> None:
    spec = endpoint("fake:step_s=0.02", batching="off", max_jobs=1)
    with hosting(settings_for(tmp_path, spec)) as host:
        first = [host.submit(f"job {number}", num_inference_steps=40) for number in range(3)]
        waiting = host.post_soon("watched", num_inference_steps=45)
        host.until(lambda: len(host.service.admission.tickets.by_id) == 4)
        (mine,) = set(host.service.admission.tickets.by_id) - set(first)
        told = events(host, mine)
        places = [data["position"] for name, data in told if "position" in data]
        assert places == sorted(places, reverse=True)
        assert len(set(places)) > 1
        assert told[-1] == ("done", waiting.result().json())


@pytest.mark.parametrize("text", ["respond-async, previews=11", "previews=x", f"previews={'9' * 5000}"])
def test_a_bad_prefer_header_is_422(host: Host, text: str) -> None:
    assert host.post(headers={"prefer": text}).status_code == 422


def test_a_server_that_remembers_nothing_still_answers_who_waits(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, endpoint("fake:step_s=0.01"), idempotency_ttl_s=0)
    with hosting(settings) as host:
        assert host.picture("a fox", seed=1) == host.picture("a fox", seed=1)
        request_id = host.submit("told", num_inference_steps=20)
        assert events(host, request_id)[-1][0] == "done"
        tickets = host.service.admission.tickets
        host.until(lambda: not tickets.by_id)
        assert host.call(lambda: tickets.num_bytes) == 0


def test_what_had_no_effect_is_said_once_and_by_the_worker(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.05"))) as host:
        (replica,) = host.endpoint().current.replicas
        assert replica.info is not None
        replica.info = replace(replica.info, guidance_effective=False)
        waiting = host.post_soon("a cat", guidance_scale=3.0, n=2, num_inference_steps=50)
        host.until(lambda: host.service.admission.tickets.by_id)
        (ticket,) = host.service.admission.tickets.by_id.values()

        def end() -> None:
            for job in ticket.jobs:
                job.end(Done(job.request.job_id, 16, 16, 0.1, bytes(16 * 16 * 3), warnings=["no effect"]))

        host.call(end)
        assert waiting.result().json()["warnings"] == ["no effect"]


def test_a_request_cancelled_in_the_moment_of_its_last_picture_ends_once(host: Host) -> None:
    ticket = host.service.admission.tickets.by_id[host.submit("just now", num_inference_steps=50)]
    (job,) = ticket.jobs

    async def both() -> None:
        job.end(Done(job.request.job_id, 16, 16, 0.1, bytes(16 * 16 * 3)))
        host.service.admission.cancel(ticket)
        await host.service.admission.wait_for_answers()

    host.run(both())
    assert ticket.status == "cancelled"


# ---------------------------------------------------------------- many at once


@attack("64 requests at once that could mix", outcome="each has the bytes that it has alone")
def test_64_concurrent_requests_give_the_bytes_that_each_gives_alone(host: Host) -> None:
    fields = [
        {"seed": n, "num_inference_steps": (4, 8, 20)[n % 3], "guidance_scale": n / 7} for n in range(64)
    ]
    together = [host.post_soon(f"picture {n}", **one) for n, one in enumerate(fields)]
    wait(together)
    for number in range(0, 64, 9):
        alone = host.picture(f"picture {number}", **fields[number])
        assert together[number].result().json()["data"][0]["b64_json"] == alone
    assert host.endpoint().state is State.READY
    assert {one.result().status_code for one in together} == {200}


@attack("One key sends hundreds of requests", outcome="another key's request waits for two at most")
def test_one_request_among_many_of_another_key_waits_for_two_at_most(tmp_path: Path) -> None:
    spec = endpoint("fake:step_s=0.005", batching="off")
    with hosting(settings_for(tmp_path, spec)) as host:
        greedy = [host.submit(f"job {number}", num_inference_steps=50) for number in range(80)]
        tickets = [host.service.admission.tickets.by_id[request_id] for request_id in greedy]
        with host.new_client() as modest:
            before = sum(ticket.ended for ticket in tickets)
            body, headers = host.body("one", num_inference_steps=50), {"prefer": "respond-async"}
            answer = modest.post(GENERATE, json=body, headers=headers)
            mine = host.service.admission.tickets.by_id[answer.json()["id"]]
            assert not mine.jobs[0].queued, "a key's first job is handed to the worker at once"
            order: list[str] = []
            host.run(ended_in_order([*tickets, mine], mine, order))
        assert before < 60, "the other key's requests must still be waiting"
        assert order.index(mine.id) <= 3, "two that ran already, and one whose turn it was"


async def ended_in_order(tickets: list[Ticket], last: Ticket, order: list[str]) -> None:
    """Notes the tickets that end from now until `last` has."""
    living = [ticket for ticket in tickets if not ticket.ended]
    while not last.ended:
        await asyncio.sleep(0.001)
        for ticket in [one for one in living if one.ended]:
            living.remove(ticket)
            order.append(ticket.id)


def test_no_image_is_promised_sooner_than_it_takes_alone(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.2"))) as host:
        host.endpoint().dispatcher._throughput = Throughput.expected(8.0)  # each as slow as alone
        host.submit("before", num_inference_steps=50)
        refused = host.post(num_inference_steps=20, headers={"x-request-timeout-s": "5"})  # 4.2 s alone
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        host.submit(num_inference_steps=20, headers={"x-request-timeout-s": "60"})
