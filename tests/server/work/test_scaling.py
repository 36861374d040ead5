"""How many workers: the decision alone, by a clock of numbers, and a server whose load comes and goes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.server.work.lifecycle import State
from mezzotint.server.work.scaling import Decision, Load, Policy, Watch, decide
from tests.server.hosting import endpoint, hosting, settings_for

POLICY = Policy(least=1, most=4, target_backlog_s=5.0, up_delay_s=10.0, down_delay_s=60.0)


def run(looks: list[tuple[float, float, int, float]], replicas: int = 1) -> list[tuple[float, Decision]]:
    """The decisions over looks of (time, backlog, jobs, work that came so far), each carried out at once."""
    watch, made = Watch(), []
    for now, backlog_s, num_jobs, taken_s in looks:
        watch, decision = decide(POLICY, watch, now, Load(replicas, backlog_s, num_jobs, taken_s))
        if decision is not None:
            replicas = decision.replicas
            made.append((now, decision))
    return made


def test_workers_are_added_once_the_backlog_was_over_the_target_for_the_whole_delay() -> None:
    looks = [(float(now), 12.4, 9, 0.0) for now in range(12)]
    ((now, decision),) = run(looks, replicas=2)
    assert (now, decision.replicas) == (10.0, 3)
    assert decision.reason == "backlog 12.4 s over 10 s for 10 s: 2 -> 3"


def test_a_backlog_that_drops_in_between_adds_nothing() -> None:
    looks = [(float(now), 0.0 if now % 9 == 0 else 50.0, 9, 0.0) for now in range(200)]
    assert run(looks) == []


def test_there_are_never_more_workers_than_jobs() -> None:
    assert run([(float(now), 500.0, 1, 0.0) for now in range(100)]) == []


def test_workers_that_are_busy_all_the_time_stay_though_little_waits() -> None:
    busy = [(float(now), 2.0, 4, 3.9 * now) for now in range(1000)]
    assert run(busy, replicas=4) == []


def test_workers_without_work_are_taken_away_to_the_fewest() -> None:
    ((now, decision),) = run([(float(now), 0.0, 0, 7.0) for now in range(200)], replicas=4)
    assert (now, decision.replicas) == (60.0, 1)
    assert decision.reason == "backlog under 14 s and work for 0.0 workers for 60 s: 4 -> 1"


@pytest.mark.parametrize("backlog_s", [4.9, 5.1, 9.9, 10.1, 14.9, 19.0, 400.0])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_a_steady_load_is_followed_once_and_then_left_alone(backlog_s: float, replicas: int) -> None:
    made = run([(float(now), backlog_s, 99, 0.0) for now in range(600)], replicas)
    assert len(made) <= 1, "it flaps"


@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.floats(0, 100), st.integers(0, 20), st.floats(0, 50))),
    st.integers(1, 4),
)
def test_no_load_makes_it_leave_its_bounds_or_turn_sooner_than_its_delay(
    steps: list[tuple[float, float, int, float]], replicas: int
) -> None:
    times = itertools.accumulate(step for step, *_ in steps)
    taken = itertools.accumulate(work for *_, work in steps)
    looks = [(now, s[1], s[2], work_s) for now, s, work_s in zip(times, steps, taken, strict=True)]
    before, last = replicas, 0.0
    for now, decision in run(looks, replicas):
        assert POLICY.least <= decision.replicas <= POLICY.most
        delay_s = POLICY.up_delay_s if decision.replicas > before else POLICY.down_delay_s
        assert decision.replicas != before
        assert now - last >= delay_s - 1e-6
        before, last = decision.replicas, now


def test_a_load_that_comes_and_goes_is_followed_from_zero_and_back_and_no_request_fails(
    tmp_path: Path,
) -> None:
    scaled = {"min_replicas": 0, "max_replicas": 4, "target_backlog_s": 0.2, "batching": "off"}
    spec = endpoint("fake:step_s=0.02", **scaled, scale_up_delay_s=0.1, scale_down_delay_s=1.0)
    with hosting(settings_for(tmp_path / "a", endpoint("fake:step_s=0.001"))) as host:
        expected = [host.picture(f"picture {n}", seed=n, num_inference_steps=10) for n in range(24)]
    with hosting(settings_for(tmp_path / "b", spec)) as host:
        one = host.endpoint()
        host.wait_for(State.SLEEPING)
        pool = [host.post_soon(f"picture {n}", seed=n, num_inference_steps=10) for n in range(24)]
        host.until(lambda: len(one.current.ready) == 4)
        answers = [waiting.result() for waiting in pool]
        assert [answer.status_code for answer in answers] == [200] * 24
        assert [answer.json()["data"][0]["b64_json"] for answer in answers] == expected
        host.wait_for(State.SLEEPING)
        assert [replica.pid for replica in one.current.replicas] == [None]
        events = list(one.scalings)
        assert (events[0].before, events[0].after, events[0].reason) == (1, 0, "no request for 1 s")
        assert (events[1].before, events[1].after, events[1].reason) == (0, 1, "a request came")
        assert max(event.after for event in events) == 4
        assert events[-1].after == 0
        shown = host.client.get("/dedicated/beta/endpoint/one").json()
        assert shown["mezzotint"]["scaling"][1]["reason"] == "a request came"
        assert (shown["autoscalingMin"], shown["autoscalingMax"], shown["autoscalingCooldown"]) == (0, 4, 1)
        metrics = host.client.get("/metrics").text
        assert 'mezzotint_scalings_total{direction="up",endpoint="one"}' in metrics
        assert 'mezzotint_wanted_replicas{endpoint="one"} 0.0' in metrics


def test_workers_taken_away_finish_their_jobs_first(tmp_path: Path) -> None:
    spec = endpoint("fake:step_s=0.02", min_replicas=1, max_replicas=2, scale_up_delay_s=60, batching="off")
    with hosting(settings_for(tmp_path, spec)) as host:
        one = host.endpoint()
        host.call(one._scale, 2)
        host.until(lambda: len(one.current.ready) == 2)
        first, second = one.current.replicas
        ids = [host.submit(f"job {number}", num_inference_steps=40) for number in range(2)]
        for request_id in ids:
            host.wait_until(request_id, "running")
        host.call(one._scale, 1)
        assert len(one.current.replicas) == 1
        for request_id in ids:
            assert host.wait_until(request_id, "done")["status"] == "done"
        (left,) = one.current.replicas
        gone = second if left is first else first
        host.until(lambda: gone.pid is None)
        assert (first.num_restarts, second.num_restarts) == (0, 0), "none was killed"
