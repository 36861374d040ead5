"""Workers that die, hang or cannot load; jobs that survive them. Real processes, real signals."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from functools import partial
from pathlib import Path

import pytest

from mezzotint.messages import PrefetchAdapter
from mezzotint.server.work.lifecycle import State
from mezzotint.server.work.profiles import load_message
from mezzotint.server.work.tickets import Ticket
from mezzotint.server.workers import policy
from mezzotint.server.workers.replica import ReplicaState
from tests.attacks import attack
from tests.server.hosting import GENERATE, Host, endpoint, hosting, settings_for


def pid(host: Host, number: int = 0) -> int:
    """Of this worker's process. An endpoint is ready with its first worker, so the others may still start."""
    replica = host.endpoint().current.replicas[number]
    host.until(lambda: replica.pid is not None)
    assert replica.pid is not None
    return replica.pid


def error_code(answer: object) -> str:
    code: str = answer.json()["error"]["code"]  # type: ignore[attr-defined]
    return code


@attack("Workers killed among twenty requests", outcome="none is lost, no byte differs")
def test_killed_workers_among_20_requests_lose_none_and_change_no_byte(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.004"))) as host:
        fields = [{"seed": number, "num_inference_steps": 10 + number % 7} for number in range(20)]
        quiet = [host.picture(f"picture {number}", **one) for number, one in enumerate(fields)]
        pool = [host.post_soon(f"picture {number}", **one) for number, one in enumerate(fields)]
        for _ in range(3):
            done = num_done(host)
            kill(host)
            host.until(partial(num_more_done, host, done))
        answers = [one.result() for one in pool]
        assert [answer.status_code for answer in answers] == [200] * 20
        assert [answer.json()["data"][0]["b64_json"] for answer in answers] == quiet
        outcomes = [ticket.status for ticket in host.service.admission.tickets.by_id.values()]
        assert outcomes == ["done"] * 40
        assert host.endpoint().current.replicas[0].num_restarts == 3


def num_done(host: Host) -> int:
    return sum(ticket.status == "done" for ticket in host.service.admission.tickets.by_id.values())


def num_more_done(host: Host, before: int) -> bool:
    return num_done(host) > before


def kill(host: Host) -> None:
    """Kills the worker and waits until another is ready."""
    replica = host.endpoint().current.replicas[0]
    killed = pid(host)
    os.kill(killed, signal.SIGKILL)
    host.until(lambda: replica.is_ready and replica.pid != killed)


def test_every_request_ends_in_exactly_one_of_done_failed_cancelled(tmp_path: Path) -> None:
    """Some of 20 fail, one kills every worker it meets, some are cancelled; and a worker is killed."""
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.01"))) as host:
        prompts = [f"picture {number}" for number in range(14)] + ["a !fail@2"] * 3 + ["a !die@3"]
        pool = [host.post_soon(prompt, num_inference_steps=12) for prompt in prompts]
        dropped = [host.submit("long", num_inference_steps=50) for _ in range(2)]
        os.kill(pid(host), signal.SIGKILL)
        for request_id in dropped:
            host.client.delete(f"/dedicated/v1/requests/{request_id}")
        wait(pool)
        statuses = [one.result().status_code for one in pool]
        assert statuses == [200] * 14 + [500] * 4
        assert error_code(pool[-1].result()) == "worker_crashed"
        ended = [ticket.status for ticket in host.service.admission.tickets.by_id.values()]
        assert sorted(ended) == ["cancelled"] * 2 + ["done"] * 14 + ["failed"] * 4
        assert host.endpoint().dispatcher.idle
        assert host.post().status_code == 200, "the server goes on"
        text = host.client.get("/metrics").text
        assert 'mezzotint_requests_total{endpoint="one",outcome="done"} 15.0' in text
        assert 'mezzotint_failures_total{code="worker_crashed",endpoint="one"} 1.0' in text


@attack("A request that kills its workers", outcome="given up; the endpoint goes on")
def test_a_job_that_kills_two_workers_alone_fails_and_the_endpoint_goes_on(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, max_restarts=2)) as host:
        for _ in range(3):  # more deaths than max_restarts: they are the job's, not the endpoint's
            answer = host.post("a !die@2")
            assert (answer.status_code, error_code(answer)) == (500, "worker_crashed")
        host.wait_for(State.READY)
        assert host.post().status_code == 200


def has_reached(ticket: Ticket, step: int) -> bool:
    return ticket.step >= step


def test_a_job_whose_workers_die_of_something_else_is_not_given_up(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.01"))) as host:
        request_id = host.submit("unlucky", num_inference_steps=40)
        ticket = host.service.admission.tickets.by_id[request_id]
        for step in (3, 9, 15):
            host.until(partial(has_reached, ticket, step))
            kill(host)
        assert host.wait_until(request_id, "done")["step"] == 40


def test_a_job_that_kills_one_worker_runs_again(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        first = pid(host)
        assert host.post(f"a !die-once@2:{tmp_path / 'flag'}").status_code == 200
        assert pid(host) != first


def test_a_worker_that_dies_at_start_is_restarted_until_the_limit(tmp_path: Path) -> None:
    with hosting(
        settings_for(tmp_path, endpoint("fake:die_at_start=1"), max_restarts=2), ready=False
    ) as host:
        waiting = host.post_soon()
        host.wait_for(State.FAILED)
        answer = waiting.result()
        assert (answer.status_code, error_code(answer)) == (503, "endpoint_failed")
        assert int(answer.headers["retry-after"]) >= 1
        assert host.endpoint().current.replicas[0].num_restarts == 2
        answer = host.post()
        assert (answer.status_code, error_code(answer)) == (503, "endpoint_failed")
        assert "SIGKILL" in host.endpoint().failure
        assert "SIGKILL" in answer.text, "its users learn why"


def test_a_worker_that_dies_at_start_once_is_restarted_and_serves(tmp_path: Path) -> None:
    source = f"fake:die_at_start=1,once={tmp_path / 'flag'}"
    with hosting(settings_for(tmp_path, endpoint(source)), ready=False) as host:
        assert host.post().status_code == 200


def test_a_model_that_cannot_load_is_not_tried_again(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:fail_load=permanent")), ready=False) as host:
        host.wait_for(State.FAILED)
        replica = host.endpoint().current.replicas[0]
        assert replica.num_restarts == 0
        assert host.endpoint().failure == "the fake model cannot be loaded"
        assert error_code(host.post()) == "endpoint_failed"
        assert host.client.get("/healthz").status_code == 200


def test_a_load_that_failed_for_the_moment_is_tried_again(tmp_path: Path) -> None:
    source = f"fake:fail_load=temporary,once={tmp_path / 'flag'}"
    with hosting(settings_for(tmp_path, endpoint(source)), ready=False) as host:
        assert host.post().status_code == 200
        assert host.endpoint().failure == ""


def test_a_model_that_loads_too_long_is_killed(tmp_path: Path) -> None:
    source = f"fake:hang_at_start=1,once={tmp_path / 'flag'}"
    with hosting(settings_for(tmp_path, endpoint(source), load_timeout_s=0.5), ready=False) as host:
        assert host.post().status_code == 200
        assert host.endpoint().current.replicas[0].num_restarts == 1


@attack("A worker that hangs", outcome="killed; its jobs run again")
def test_a_hung_worker_is_killed_and_its_jobs_run_again(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.01"), heartbeat_s=0.6)) as host:
        quiet = host.picture("steady", seed=1, num_inference_steps=30)
        stopped = pid(host)
        waiting = host.post_soon("steady", seed=1, num_inference_steps=30)
        os.kill(stopped, signal.SIGSTOP)
        answer = waiting.result()
        assert answer.json()["data"][0]["b64_json"] == quiet
        assert pid(host) != stopped


def test_kills_between_pictures_never_fail_an_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "FIRST_PAUSE_S", 1e6)  # nor does the next worker wait
    with hosting(settings_for(tmp_path, max_restarts=1)) as host:
        for number in range(4):
            assert host.post(seed=number).status_code == 200
            kill(host)
        assert host.post().status_code == 200
        assert host.endpoint().current.replicas[0].num_restarts == 4


def test_kills_of_an_idle_worker_never_fail_an_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "STEADY_S", 0.0)
    monkeypatch.setattr(policy, "FIRST_PAUSE_S", 1e6)
    with hosting(settings_for(tmp_path, max_restarts=1)) as host:
        for _ in range(4):
            kill(host)
        assert host.post().status_code == 200


@attack("Descriptors exhausted while a worker must start", outcome="it starts when there are some")
def test_a_worker_that_must_start_while_descriptors_are_exhausted_starts_when_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "LONGEST_PAUSE_S", 0.02)
    with hosting(settings_for(tmp_path, max_restarts=1)) as host:
        replica = host.endpoint().current.replicas[0]
        assert host.post().status_code == 200
        with few_descriptors(1):
            os.kill(pid(host), signal.SIGKILL)
            host.until(lambda: replica.num_restarts > 10)
            assert "Too many open files" in host.endpoint().failure
            assert host.endpoint().state is State.STARTING
            before = os.listdir("/proc/self/fd")
            host.until(lambda: replica.num_restarts > 30)
            assert os.listdir("/proc/self/fd") == before, "a start that failed leaves no descriptor open"
        assert host.post().status_code == 200


@contextlib.contextmanager
def few_descriptors(num_left: int) -> Iterator[None]:
    """This process may open no more than so many files."""
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(num_left + 1)]
    for descriptor in held:
        os.close(descriptor)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_workers_that_die_before_their_first_picture_fail_the_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "STEADY_S", 1e6)
    with hosting(settings_for(tmp_path, max_restarts=2)) as host:
        assert host.post().status_code == 200
        kill(host)  # had made a picture
        for _ in range(2):
            kill(host)
        os.kill(pid(host), signal.SIGKILL)
        host.wait_for(State.FAILED)
        assert host.endpoint().failure == (
            "3 workers in a row died before they had made a picture, "
            "the last because: the worker process ended (signal SIGKILL)"
        )
        host.client.put("/dedicated/beta/endpoint/one/restart")
        host.wait_for(State.READY)
        assert host.post().status_code == 200


def test_a_worker_that_was_asked_and_delivered_nothing_counts_however_long_it_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "STEADY_S", 0.0)
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.01"), max_restarts=0)) as host:
        host.wait_until(host.submit(num_inference_steps=50), "running")
        os.kill(pid(host), signal.SIGKILL)
        host.wait_for(State.FAILED)


def test_a_busy_worker_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.02"), heartbeat_s=0.6)) as host:
        before = pid(host)
        assert host.post(num_inference_steps=50).status_code == 200
        assert pid(host) == before


def test_a_model_whose_steps_are_slow_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.7"), heartbeat_s=0.3)) as host:
        before = pid(host)
        assert host.post(num_inference_steps=2).status_code == 200
        assert pid(host) == before


def test_a_worker_that_says_it_is_busy_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, heartbeat_s=0.3)) as host:
        before = pid(host)
        assert host.post("a !slow@2", num_inference_steps=4).status_code == 200
        assert pid(host) == before


def test_a_worker_that_is_busy_for_too_long_is_killed(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, heartbeat_s=30)) as host:
        before = pid(host)
        answer = host.post("a !stuck@2")
        assert (answer.status_code, error_code(answer)) == (500, "worker_crashed")
        host.wait_for(State.READY)
        assert pid(host) != before
        assert host.post().status_code == 200


@attack("A worker that reads no message", outcome="the server goes on")
def test_a_worker_that_does_not_read_never_blocks_the_server(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, heartbeat_s=30)) as host:
        os.kill(pid(host), signal.SIGSTOP)
        replica = host.endpoint().current.replicas[0]
        for _ in range(200):  # far more than a pipe holds
            host.call(replica.send, PrefetchAdapter("r" * 9000))
        assert host.client.get("/healthz").status_code == 200
        kill(host)
        assert host.post().status_code == 200


def test_calibrated_rows_survive_a_restart_of_the_server(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint(max_rows=16))) as host:
        known = host.endpoint().calibration
        assert known is not None
        assert known.info.rows == 4
        key = host.first_key
    other = endpoint(max_rows=16, default_steps=9)  # no calibration depends on that
    with hosting(settings_for(tmp_path, other), ready=False, key=key) as host:
        again = host.endpoint()
        assert again.calibration is not None
        assert again.calibration.info == known.info
        assert load_message(again.spec, again.calibration).rows == 4
    with hosting(settings_for(tmp_path, endpoint(max_rows=8)), ready=False, key=key) as host:
        assert load_message(host.endpoint().spec, known).rows is None


def test_workers_end_with_the_server(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint(replicas=2))) as host:
        pids = [pid(host, number) for number in range(2)]
        assert len(set(pids)) == 2
        assert all(alive(one) for one in pids)
    assert not any(alive(one) for one in pids)


def test_stopping_does_not_wait_for_a_worker_that_hangs(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        hung = pid(host)
        os.kill(hung, signal.SIGSTOP)
    assert not alive(hung)


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{number}/status").read_text()


def test_replicas_share_the_work_and_one_death_stops_nobody(tmp_path: Path) -> None:
    spec = endpoint("fake:step_s=0.02", replicas=2, batching="off")
    with hosting(settings_for(tmp_path, spec)) as host:
        pool = [host.post_soon(f"picture {number}", num_inference_steps=20) for number in range(8)]
        host.wait_until(
            next(iter(host.service.admission.tickets.by_id), "") or host.submit("x"), "running", "done"
        )
        os.kill(pid(host, 1), signal.SIGKILL)
        assert host.endpoint().state is State.READY
        assert [one.result().status_code for one in pool] == [200] * 8
        states = [replica.state for replica in host.endpoint().current.replicas]
        assert ReplicaState.READY in states


def test_spawn_works_as_well(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, worker_start="spawn")) as host:
        assert host.post().status_code == 200


def test_no_thread_stays_behind(tmp_path: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with hosting(settings_for(tmp_path, endpoint())) as host:
        assert host.client.post(GENERATE, json=host.body()).status_code == 200
    after = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in after if name.startswith(("worker-", "encode"))}
