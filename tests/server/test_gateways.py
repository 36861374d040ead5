"""Two servers in processes of their own on one Postgres database, behind what could be any balancer."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from mezzotint.server.api import gateways as forwarding
from mezzotint.server.store import database
from tests.server.collector import children, collecting
from tests.server.hosting import GENERATE, Host, client

PATIENCE_S = 120.0
ASYNC = {"prefer": "respond-async"}


@dataclass
class Gateway:
    process: subprocess.Popen[str]
    http: httpx2.Client
    database_url: str

    def post(self, prompt: str, headers: dict[str, str], **fields: Any) -> httpx2.Response:
        body = {"model": "one", "prompt": prompt, "num_inference_steps": 10, "response_format": "png"}
        return self.http.post(GENERATE, json=body | fields, headers=headers)

    def state(self, request_id: str) -> httpx2.Response:
        return self.http.get(f"/dedicated/v1/requests/{request_id}")

    def until(self, request_id: str, *statuses: str) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while (answer := self.state(request_id)).json().get("status") not in statuses:
            assert answer.status_code == 200, answer.text
            assert time.monotonic() < end, answer.text
            time.sleep(0.05)
        values: dict[str, Any] = answer.json()
        return values

    def num_done(self) -> float:
        """Requests that have run here to their end."""
        found = re.search(r'mezzotint_requests_total{endpoint="one",outcome="done"} (\S+)', self.metrics())
        return float(found[1]) if found else 0.0

    def metrics(self) -> str:
        return self.http.get("/metrics").text

    def until_written_down(self, *request_ids: str) -> None:
        """Waits until the other servers know that these are done."""
        engine = sa.create_engine(self.database_url)
        table, end = database.requests, time.monotonic() + PATIENCE_S
        done = sa.select(sa.func.count()).where(table.c.id.in_(request_ids), table.c.state == "done")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while connection.scalar(done) != len(request_ids):
                assert time.monotonic() < end
                time.sleep(0.05)
        engine.dispose()

    def freeze(self) -> None:
        """As a machine that hangs: its connections stay, and nothing moves."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """As `kill -9` of the process and of its workers, which are in its group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def gateways(tmp_path: Path, new_postgres: Callable[[], str]) -> Iterator[tuple[Gateway, Gateway]]:
    with running(tmp_path, new_postgres(), {}) as both:
        yield both


@contextlib.contextmanager
def running(tmp_path: Path, url: str, variables: dict[str, str]) -> Iterator[tuple[Gateway, Gateway]]:
    """Two gateways on the database at `url`, with these variables in their environment."""
    with contextlib.ExitStack() as stack:
        started, key = [], ""
        for name in ("first", "second"):
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.server.standalone", tmp_path / name, "1"],
                env=os.environ | {"MEZZOTINT_TEST_DATABASE_URL": url} | variables,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
            )  # fmt: skip
            stack.callback(_end, process)
            assert process.stdout is not None
            address, made = process.stdout.readline().split()
            key = key or made
            http = stack.enter_context(client(address, key))
            http.timeout = httpx2.Timeout(PATIENCE_S)
            started.append(Gateway(process, http, url))
        for each in started:
            end = time.monotonic() + PATIENCE_S
            while each.http.get("/readyz").status_code != 200:
                assert time.monotonic() < end
                time.sleep(0.05)
        yield started[0], started[1]


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def picture(state: dict[str, Any]) -> str:
    data: str = state["result"]["data"][0]["b64_json"]
    return data


def test_state_result_events_and_cancel_are_found_through_the_other_gateway(
    gateways: tuple[Gateway, Gateway],
) -> None:
    first, second = gateways
    request_id = first.post("a cat", ASYNC, seed=7).json()["id"]
    with second.http.stream("GET", f"/dedicated/v1/requests/{request_id}/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        assert "event: done" in [line for line in events.iter_lines() if line.startswith("event: ")]
    assert picture(second.state(request_id).json()) == picture(first.state(request_id).json())

    hanging = first.post("a !hang@3", ASYNC).json()["id"]
    assert second.http.delete(f"/dedicated/v1/requests/{hanging}").json()["status"] == "cancelled"
    assert first.state(hanging).json()["status"] == "cancelled"

    for unknown in (second.state("req_unknown"), first.state("req_unknown")):
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
    other = first.http.post("/dedicated/beta/keys", json={"name": "stranger"}).json()["secret"]
    seen = second.http.get(
        f"/dedicated/v1/requests/{request_id}", headers={"authorization": f"Bearer {other}"}
    )
    assert seen.status_code == 404, "another key must not see it"


def test_the_same_idempotency_key_is_one_request_over_both_gateways(
    gateways: tuple[Gateway, Gateway],
) -> None:
    headers = {"idempotency-key": "the same"}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda number: gateways[number % 2].post("a cat", headers), range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len({answer.content for answer in answers}) == 1
    again = gateways[1].post("a dog", headers)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")

    failing = {"idempotency-key": "it fails"}
    failed = [gateway.post("a !fail@3", failing).status_code for gateway in gateways]
    assert failed == [500, 500]
    assert gateways[1].post("a !fail@3", failing).status_code == 500, "a failed one runs anew"


def test_a_killed_gateways_requests_end_once_each_on_the_other_with_the_same_bytes(
    gateways: tuple[Gateway, Gateway],
) -> None:
    first, second = gateways
    finished = first.post("early", ASYNC | {"idempotency-key": "early"}).json()["id"]
    early = first.until(finished, "done")
    linked = first.post("linked", ASYNC, response_format="url").json()["id"]
    url = first.until(linked, "done")["result"]["data"][0]["url"]
    drawn = first.http.get(url).content
    first.until_written_down(finished, linked)
    seeded = {
        seed: first.post("a cat", ASYNC | {"idempotency-key": f"k{seed}"}, seed=seed).json()["id"]
        for seed in range(8)
    }
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.post, "a cat", {"idempotency-key": "k7"}, seed=7)  # through the second
        first.until(seeded[0], "running", "done")
        first.kill()
        joined = waiting.result()
    assert joined.status_code == 200, joined.text
    assert joined.json()["id"] == seeded[7]
    states = {seed: second.until(request_id, "done", "failed") for seed, request_id in seeded.items()}
    num_done = second.num_done()
    assert second.until(finished, "done") == early
    resent = second.post("early", ASYNC | {"idempotency-key": "early"})
    assert resent.json()["id"] == finished
    waited = second.post("early", {"idempotency-key": "early"})
    assert waited.json() == early["result"]
    assert "generate;dur=0.0" not in waited.headers["server-timing"]
    other = second.post("other", {"idempotency-key": "early"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    assert second.num_done() == num_done, "what was done need not run again"
    again = second.until(linked, "done")["result"]["data"][0]["url"]
    path = again.removeprefix(str(first.http.base_url).rstrip("/"))  # a balancer's name would do
    assert second.http.get(path).content == drawn, "the drawn seed is the same when it runs again"
    assert second.num_done() == num_done + 1, "the pictures of its URLs are on the dead server's disk"
    for seed, state in states.items():
        resent = second.post("a cat", {"idempotency-key": f"k{seed}"}, seed=seed)
        assert resent.json()["id"] == seeded[seed]
        fresh = second.post("a cat", {}, seed=seed).json()
        assert fresh["id"] != seeded[seed]
        assert picture(state) == resent.json()["data"][0]["b64_json"] == fresh["data"][0]["b64_json"]


def test_a_gateway_that_stops_leaves_its_promised_requests_to_the_other(
    gateways: tuple[Gateway, Gateway],
) -> None:
    first, second = gateways
    slow = first.post("slow", ASYNC, num_inference_steps=50, n=8).json()["id"]
    first.until(slow, "running")
    first.process.terminate()
    first.process.wait(PATIENCE_S)
    assert second.until(slow, "done", "failed")["status"] == "done"


def test_a_trace_goes_on_through_the_other_gateway_and_after_the_death_of_its_own(
    tmp_path: Path, new_postgres: Callable[[], str]
) -> None:
    traces = {name: f"{number:032x}" for number, name in enumerate(("own", "other"), 1)}
    sent = {
        name: {"traceparent": f"00-{trace}-00000000000000ff-01", "idempotency-key": "same"}
        for name, trace in traces.items()
    }
    with contextlib.ExitStack() as stack:
        collector = stack.enter_context(collecting())
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        first, second = stack.enter_context(running(tmp_path, new_postgres(), variables))
        request_id = first.post("a !slow@5 cat", ASYNC | sent["own"], seed=7).json()["id"]
        collector.until(lambda spans: any(each.parent == "00000000000000ff" for each in spans))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(second.post, "a !slow@5 cat", sent["other"], seed=7)
            first.until(request_id, "running")
            first.kill()
            joined = waiting.result()
        assert (joined.status_code, joined.json()["id"]) == (200, request_id)
        spans = collector.until(lambda spans: any(each.name == "request" for each in spans))
        own = [each for each in spans if each.trace == traces["own"]]
        (asked,) = (each for each in own if each.parent == "00000000000000ff")
        (request,) = (each for each in own if each.name == "request")
        assert request.parent == asked.id, "the second gateway goes on with the trace of the first"
        assert request.resource["service.instance.id"] != asked.resource["service.instance.id"]
        assert [each.name for each in children(spans, request)] == ["queue", "generate", "encode"]
        other = collector.until(lambda spans: any(request.id in each.links for each in spans))
        assert [each.trace for each in other if request.id in each.links] == [traces["other"]]


def test_a_frozen_gateway_is_given_up_and_what_it_had_runs_on_the_other(
    gateways: tuple[Gateway, Gateway],
) -> None:
    first, second = gateways
    request_id = first.post("slow", ASYNC | {"idempotency-key": "k"}, num_inference_steps=50, n=4).json()[
        "id"
    ]
    with (
        ThreadPoolExecutor(1) as pool,
        second.http.stream("GET", f"/dedicated/v1/requests/{request_id}/events") as events,
    ):
        lines = events.iter_lines()
        assert next(lines).startswith("event: ")
        waiting = pool.submit(
            second.post, "slow", {"idempotency-key": "k"}, num_inference_steps=50, n=4
        )  # through the second
        first.until(request_id, "running")
        first.freeze()
        with pytest.raises(httpx2.RemoteProtocolError):
            for _ in lines:
                pass
        joined = waiting.result()
    assert joined.status_code == 200, joined.text
    assert joined.json()["id"] == request_id
    assert second.num_done() == 1


def test_a_gateway_that_lives_and_cannot_be_reached_is_a_503_that_says_so(
    pair: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "UNREACHABLE_S", 0.5)
    first, second = pair
    request_id = first.submit("a !hang@3", headers={"idempotency-key": "k"})
    table = database.gateways
    with socket.create_server(("127.0.0.1", 0)) as mute:
        closed = f"http://127.0.0.1:{_closed_port()}"
        for url in (closed, f"http://127.0.0.1:{mute.getsockname()[1]}"):
            with second.service.engine.begin() as connection:
                connection.execute(table.update().where(table.c.url == _url(first)).values(url=url))
            questions = [
                second.client.get(f"/dedicated/v1/requests/{request_id}"),
                second.client.get(f"/dedicated/v1/requests/{request_id}/events"),
                second.client.delete(f"/dedicated/v1/requests/{request_id}"),
            ]
            if url == closed:  # a new request would wait at the other for as long as it lives
                questions.append(second.post("a !hang@3", headers={"idempotency-key": "k"}))
            for answer in questions:
                code = answer.json()["error"]["code"]
                assert (answer.status_code, code) == (503, "gateway_unreachable"), answer.text
                assert int(answer.headers["retry-after"]) >= 1
            with second.service.engine.begin() as connection:
                connection.execute(table.update().where(table.c.url == url).values(url=_url(first)))
    assert second.client.delete(f"/dedicated/v1/requests/{request_id}").json()["status"] == "cancelled"
    assert first.state(request_id)["status"] == "cancelled"


def test_an_answer_that_stops_half_way_at_the_other_gateway_is_cut_off(
    pair: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "QUIET_S", 0.5)  # under the time between two signs of life
    first, second = pair
    request_id = first.submit("a !hang@3")
    with second.client.stream("GET", f"/dedicated/v1/requests/{request_id}/events") as events:
        assert events.status_code == 200
        with pytest.raises(httpx2.RemoteProtocolError):
            events.read()


def _url(host: Host) -> str:
    url: str = host.app.state.gateway_url
    return url


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port: int = closed.getsockname()[1]
        return port
