"""What the server takes a step for: as measured at every step, and R only as it was measured at a start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from mezzotint.messages import Measured, Stats
from mezzotint.server.work.lifecycle import Command, State
from mezzotint.server.workers.replica import ReplicaState
from tests.server.hosting import Host, endpoint, hosting, settings_for

ENDPOINT = "/dedicated/beta/endpoint/one"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.01"))) as running:
        yield running


def stats(**step_s: float) -> Stats:
    sizes = {f"{name[1:]}x{name[1:]}": seconds for name, seconds in step_s.items()}
    return Stats(0, 0, 0, 0, 0.0, sizes)


def test_estimates_follow_the_steps_that_were_measured_last_by_size(host: Host) -> None:
    one = host.endpoint()
    assert one.profile.step_s(None, None) == 0.01
    replica = one.current.replicas[0]
    host.call(one.dispatcher.receive, replica, stats(s16=0.03, s32=0.5))
    assert one.profile.step_s(None, None) == 0.03
    assert one.profile.step_s(32, 32) == 0.5
    assert one.profile.step_s(64, 64) == pytest.approx(0.03 * 16), "an unmeasured size goes by its pixels"


def test_waiting_requests_are_counted_anew_when_steps_turn_out_otherwise(host: Host) -> None:
    running = [host.submit(num_inference_steps=50) for _ in range(16)]
    one = host.endpoint()
    waiting = one.dispatcher.queue.waiting()[-1]
    before = waiting.work_s
    host.call(one.dispatcher.receive, one.current.replicas[0], stats(s16=1.0))
    assert waiting.work_s == pytest.approx(100 * before)
    for request in running:
        host.client.delete(f"/dedicated/v1/requests/{request}")


def test_what_an_idle_worker_finds_is_kept_and_r_stays(host: Host) -> None:
    one = host.endpoint()
    replica = one.current.replicas[0]
    assert replica.info is not None
    better = dataclasses.replace(replica.info, step_s=0.002, best_rows=8)
    host.call(one._receive, replica, Measured(better))
    assert one.profile.step_s(None, None) == 0.002
    host.command(Command.RESTART)
    host.wait_for(State.READY)
    assert one.info is not None
    assert one.info.rows == 4


def test_replicas_wait_for_the_one_that_measures_r(tmp_path: Path) -> None:
    hangs = endpoint("fake:hang_at_start=1", replicas=2)
    with hosting(settings_for(tmp_path / "a", hangs), ready=False) as host:
        states = [replica.state for replica in host.endpoint().current.replicas]
        assert states == [ReplicaState.STARTING, ReplicaState.STOPPED]
    with hosting(settings_for(tmp_path / "b", endpoint(replicas=2))) as host:
        replicas = host.endpoint().current.replicas
        host.until(lambda: all(replica.is_ready for replica in replicas))
    with hosting(settings_for(tmp_path / "b", endpoint(replicas=2)), ready=False) as host:
        assert all(replica.state is not ReplicaState.STOPPED for replica in host.endpoint().current.replicas)


def test_replicas_wait_for_the_one_that_takes_a_form_and_keep_it(tmp_path: Path) -> None:
    two = endpoint(replicas=2, performance="max")
    with hosting(settings_for(tmp_path, two)) as host:
        host.until(lambda: all(replica.is_ready for replica in host.endpoint().current.replicas))
    with hosting(settings_for(tmp_path, two), ready=False) as host:
        one = host.endpoint()
        assert one.calibration is not None, "R is known, the form is not"
        host.until(lambda: all(replica.is_ready for replica in one.current.replicas))
        forms = {replica.info.form for replica in one.current.replicas if replica.info}
        assert len(forms) == 1
        host.command(Command.RESTART)
        host.until(lambda: one.next is None)
        host.until(lambda: all(replica.is_ready for replica in one.current.replicas))
        assert forms != {replica.info.form for replica in one.current.replicas if replica.info}


def test_an_endpoint_fails_with_the_replica_that_should_have_measured(tmp_path: Path) -> None:
    broken = endpoint("fake:fail_load=permanent", replicas=2)
    with hosting(settings_for(tmp_path, broken), ready=False) as host:
        host.wait_for(State.FAILED)


def test_r_changes_when_the_owner_has_it_measured_anew(host: Host) -> None:
    one = host.endpoint()
    known = one.current.calibration
    assert known is not None
    one._calibration = one.current.calibration = dataclasses.replace(
        known, info=dataclasses.replace(known.info, rows=2)
    )
    host.command(Command.RESTART)
    host.wait_for(State.READY)
    assert one.info is not None
    assert one.info.rows == 2, "a restart keeps R"
    assert host.client.put(f"{ENDPOINT}/calibrate").json()["status"] in ("UPDATING", "RUNNING")
    host.wait_for(State.READY)
    assert one.info.rows == 4
    assert host.picture()
