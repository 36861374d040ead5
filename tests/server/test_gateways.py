"""Two servers in processes of their own on one Postgres database, behind what could be any balancer."""

from __future__ import annotations

import contextlib
import os
import signal
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

from tests.server.collector import children, collecting
from tests.server.hosting import GENERATE, client

PATIENCE_S = 120.0
ASYNC = {"prefer": "respond-async"}


@dataclass
class Gateway:
    process: subprocess.Popen[str]
    http: httpx2.Client

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
            started.append(Gateway(process, http))
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
    early = picture(first.until(finished, "done"))
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
    for seed, state in states.items():
        resent = second.post("a cat", {"idempotency-key": f"k{seed}"}, seed=seed)
        assert resent.json()["id"] == seeded[seed]
        fresh = second.post("a cat", {}, seed=seed).json()
        assert fresh["id"] != seeded[seed]
        assert picture(state) == resent.json()["data"][0]["b64_json"] == fresh["data"][0]["b64_json"]
    assert picture(second.until(finished, "done")) == early, "the drawn seed is the same when it runs again"


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
