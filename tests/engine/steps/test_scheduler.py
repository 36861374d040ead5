"""Picking is plain Python: which parked calls run next."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.engine.steps.scheduler import MAX_SIZES, Candidate, FairShares, StepTimes, pick


def candidate(job_id: str, **fields: Any) -> Candidate:
    defaults: dict[str, Any] = {"key": "shape", "rows": 1, "remaining_s": 1.0, "waited_s": 0.0}
    return Candidate(job_id, **{**defaults, **fields})


def ids(picked: Sequence[Candidate]) -> list[str]:
    return [each.job_id for each in picked]


def test_nothing_waiting_picks_nothing() -> None:
    assert pick([], max_rows=4, max_wait_s=20) == []


def test_the_job_with_least_work_left_goes_first() -> None:
    jobs = [candidate("long", remaining_s=5, key="a"), candidate("short", remaining_s=0.4, key="b")]
    assert ids(pick(jobs, max_rows=4, max_wait_s=20)) == ["short"]


def test_calls_of_the_leaders_key_fill_the_batch_in_order_of_urgency() -> None:
    jobs = [
        candidate("third", remaining_s=3),
        candidate("other", remaining_s=1.5, key="another shape"),
        candidate("first", remaining_s=1),
        candidate("second", remaining_s=2),
        candidate("fourth", remaining_s=4),
    ]
    assert ids(pick(jobs, max_rows=3, max_wait_s=20)) == ["first", "second", "third"]


def test_a_call_without_a_key_goes_alone() -> None:
    jobs = [candidate("a", key=None), candidate("b", key=None)]
    assert ids(pick(jobs, max_rows=4, max_wait_s=20)) == ["a"]


def test_rows_are_counted_not_calls() -> None:
    jobs = [
        candidate("a", rows=2, remaining_s=1),
        candidate("b", rows=2, remaining_s=2),
        candidate("c", rows=1, remaining_s=3),
    ]
    assert ids(pick(jobs, max_rows=3, max_wait_s=20)) == ["a", "c"]


def test_a_call_with_more_rows_than_a_forward_takes_leads_alone() -> None:
    jobs = [candidate("big", rows=6, remaining_s=1), candidate("small", remaining_s=2)]
    assert ids(pick(jobs, max_rows=4, max_wait_s=20)) == ["big"]


def test_a_job_that_has_waited_past_its_bound_goes_first() -> None:
    jobs = [
        candidate("short", remaining_s=0.1, key="a"),
        candidate("starved", remaining_s=50, waited_s=21, key="b"),
        candidate("starved longer", remaining_s=60, waited_s=22, key="c"),
    ]
    assert ids(pick(jobs, max_rows=1, max_wait_s=20)) == ["starved longer"]
    assert ids(pick(jobs, max_rows=1, max_wait_s=30)) == ["short"]


def test_priority_goes_before_work_but_not_before_the_overdue() -> None:
    jobs = [
        candidate("paid", remaining_s=9, priority=1),
        candidate("short", remaining_s=1),
        candidate("overdue", remaining_s=9, waited_s=21),
    ]
    assert ids(pick(jobs, max_rows=3, max_wait_s=20)) == ["overdue", "paid", "short"]


def test_everyones_most_urgent_job_comes_before_anyones_second() -> None:
    jobs = [candidate(f"crowd {left}", remaining_s=left, owner="crowd") for left in (1, 2, 3, 4)]
    jobs.append(candidate("lone", remaining_s=9, owner="lone"))
    assert ids(pick(jobs, max_rows=3, max_wait_s=20)) == ["crowd 1", "lone", "crowd 2"]


def test_an_owner_far_ahead_lets_the_others_pass_but_not_a_higher_priority() -> None:
    jobs = [
        candidate("flood", remaining_s=1, owner="flood", owner_lead_s=21),
        candidate("patient", remaining_s=50, owner="patient"),
    ]
    assert ids(pick(jobs, max_rows=1, max_wait_s=20)) == ["patient"]
    assert ids(pick(jobs, max_rows=1, max_wait_s=22)) == ["flood"]
    paid = candidate("paid", remaining_s=1, owner="flood", owner_lead_s=21, priority=1)
    assert ids(pick([paid, *jobs], max_rows=1, max_wait_s=20)) == ["paid"]


def test_a_flood_of_short_jobs_delays_another_owners_long_one_by_a_bounded_time() -> None:
    shares, left, now = FairShares(), {"long": 50.0}, 0
    while left["long"]:
        left = {"long": left["long"], f"short {now // 4}": left.get(f"short {now // 4}", 4.0)}
        owners = {name: name.split()[0] for name in left}
        leads = shares.leads(frozenset(owners.values()))
        jobs = [
            candidate(name, remaining_s=steps, owner=owners[name], owner_lead_s=leads[owners[name]])
            for name, steps in left.items()
        ]
        (job,) = pick(jobs, max_rows=1, max_wait_s=20)
        shares.add([owners[job.job_id]], 1.0)
        left[job.job_id] -= 1
        left = {name: steps for name, steps in left.items() if steps or name == "long"}
        now += 1
    assert now <= 2 * 50 + 20 + 1


def test_who_comes_or_comes_back_starts_level_and_has_earned_nothing_by_absence() -> None:
    shares = FairShares()
    shares.leads(frozenset("a"))
    shares.add("a", 10.0)
    assert shares.leads(frozenset("ab")) == {"a": 0.0, "b": 0.0}
    shares.add("aab", 9.0)
    assert shares.leads(frozenset("ab")) == {"a": 3.0, "b": 0.0}
    shares.leads(frozenset("b"))
    assert shares.leads(frozenset("ab")) == {"a": 3.0, "b": 0.0}, "leaving for a moment forgives nothing"
    shares.forget()
    assert shares.leads(frozenset("ab")) == {"a": 0.0, "b": 0.0}


def test_a_running_job_is_carried_on_rather_than_rotated() -> None:
    left = {"a": 5, "b": 5}
    order = []
    while left:
        jobs = [candidate(name, remaining_s=steps, arrival=ord(name)) for name, steps in left.items()]
        (job,) = pick(jobs, max_rows=1, max_wait_s=1e9)
        order.append(job.job_id)
        left[job.job_id] -= 1
        if not left[job.job_id]:
            del left[job.job_id]
    assert order == ["a"] * 5 + ["b"] * 5


def test_a_short_job_overtakes_a_long_one_in_mid_run() -> None:
    jobs = [candidate("long", remaining_s=40, arrival=1), candidate("short", remaining_s=4, arrival=2)]
    assert ids(pick(jobs, max_rows=1, max_wait_s=20)) == ["short"]


def arrivals(num: int, load: float) -> list[tuple[float, int]]:
    """(time, steps): Poisson arrivals, every sixth of 50 steps, the rest of 4; a step takes 1."""
    chance = random.Random(1)
    steps = [50 if index % 6 == 5 else 4 for index in range(num)]
    rate = load / (sum(steps) / num)
    times = itertools.accumulate(chance.expovariate(rate) for _ in steps)
    return list(zip(times, steps, strict=True))


def ends_by_picking(jobs: Sequence[tuple[float, int]]) -> dict[int, float]:
    now = 0.0
    left: dict[int, int] = {}
    ends: dict[int, float] = {}
    coming = dict(enumerate(jobs))
    last: dict[int, float] = {}
    while coming or left:
        for index in [index for index, (time, _) in coming.items() if time <= now]:
            left[index], last[index] = coming.pop(index)[1], now
        if not left:
            now = min(time for time, _ in coming.values())
            continue
        parked = [
            candidate(str(index), key=None, remaining_s=steps, waited_s=now - last[index], arrival=index)
            for index, steps in left.items()
        ]
        (picked,) = pick(parked, max_rows=1, max_wait_s=2000)
        index = int(picked.job_id)
        now += 1
        last[index] = now
        left[index] -= 1
        if not left[index]:
            del left[index]
            ends[index] = now
    return ends


def test_short_jobs_among_long_ones_end_four_times_sooner_than_in_a_queue() -> None:
    jobs = arrivals(600, load=0.8)
    free, in_turn = 0.0, {}
    for index, (time, steps) in enumerate(jobs):
        free = max(free, time) + steps
        in_turn[index] = free

    def p95(ends: dict[int, float]) -> float:
        took = sorted(ends[index] - time for index, (time, steps) in enumerate(jobs) if steps == 4)
        return took[int(0.95 * len(took))]

    picked = ends_by_picking(jobs)
    assert p95(picked) * 4 < p95(in_turn)
    assert max(picked.values()) == pytest.approx(max(in_turn.values()), rel=0.01)


@given(
    st.lists(
        st.builds(
            Candidate,
            job_id=st.text(max_size=3),
            key=st.sampled_from([None, "a", "b"]),
            rows=st.integers(1, 9),
            remaining_s=st.floats(0, 100),
            waited_s=st.floats(0, 100),
            priority=st.integers(-1, 1),
            arrival=st.integers(0, 9),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 8),
)
def test_a_pick_is_never_empty_never_too_big_and_of_one_key(jobs: list[Candidate], max_rows: int) -> None:
    picked = pick(jobs, max_rows=max_rows, max_wait_s=20)
    assert picked
    if len(picked) > 1:
        assert {each.key for each in picked} == {picked[0].key} != {None}
        assert sum(each.rows for each in picked) <= max_rows
    fits = [each for each in jobs if each.key == picked[0].key and each not in picked]
    if picked[0].key is not None and fits:
        room = max_rows - sum(each.rows for each in picked)
        assert all(each.rows > room for each in fits)


def test_unmeasured_sizes_are_scaled_by_pixels_from_the_nearest_one() -> None:
    times = StepTimes()
    assert times.estimate(200, 100) == 2 * times.estimate(100, 100) > 0
    times.add(100, 100, 0.1)
    times.add(400, 400, 9.0)
    assert times.estimate(100, 200) == pytest.approx(0.2)
    assert times.estimate(400, 300) == pytest.approx(6.75)
    assert times.table() == {"100x100": 0.1, "400x400": 9.0}


def test_one_slow_forward_changes_no_estimate() -> None:
    times = StepTimes()
    for slow in (2.24, 9.0):
        for _ in range(3):
            times.add(8, 8, 0.025)
        times.add(8, 8, slow)
        assert times.estimate(8, 8) == 0.025


def test_a_wrong_first_figure_is_put_right_by_the_first_step() -> None:
    times = StepTimes()
    times.add(8, 8, 2.24)
    times.add(8, 8, 0.025)
    assert times.estimate(8, 8) == 0.025


def test_a_change_that_lasts_shows_within_ten_steps() -> None:
    times = StepTimes()
    for seconds in (0.025, 0.075, 0.025):
        for step in range(20):
            times.add(8, 8, seconds * (1 + step % 3 / 10))
            if step >= 9:
                assert times.estimate(8, 8) == pytest.approx(seconds, rel=0.2)


def test_only_the_latest_sizes_are_remembered() -> None:
    times = StepTimes()
    for width in range(1, 2 * MAX_SIZES):
        times.add(8, 8, 1.0)
        times.add(width, 100, 0.1)
    assert len(times.table()) == MAX_SIZES
    assert times.estimate(8, 8) == 1.0, "what is still in use stays"


def test_the_scheduler_imports_no_torch() -> None:
    heavy = "{'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    code = f"import sys, mezzotint.engine.steps.scheduler; sys.exit(bool({heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
