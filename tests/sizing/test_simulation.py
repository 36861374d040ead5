"""The simulation against results that are known: fixed gaps, the formula of M/D/1, and a load that steps."""

from __future__ import annotations

import statistics

import pytest

from mezzotint.config import EndpointSettings
from mezzotint.load.arrivals import Arrival, Mix, generated
from mezzotint.load.generator import Shape
from mezzotint.load.results import summarize
from mezzotint.sizing.objective import Objective, offered, outcome, search
from mezzotint.sizing.simulation import Simulated, fixed, lone_times, simulate
from mezzotint.sizing.speed import Speed

SPEC = EndpointSettings(id="plan", deadline_s=1e6, max_queue_s=1e6)
TENTH = Speed({1: 0.1}, picture_s=0.0)
TEN_STEPS = Mix(steps=((10, 1.0),), n=((1, 1.0),))


def every(gap_s: float, num: int, steps: int = 10) -> list[Arrival]:
    return [Arrival(number * gap_s, steps) for number in range(num)]


def latencies(run: Simulated) -> list[float]:
    return [sent.seconds for sent in sorted(run.measured.sent, key=lambda sent: sent.arrival.at_s)]


def test_requests_that_never_meet_take_their_lone_time_and_cost_the_whole_span() -> None:
    run = simulate(every(2.0, 20), TENTH, SPEC)
    assert latencies(run) == pytest.approx([1.0] * 20)
    assert run.worker_s == pytest.approx(19 * 2.0 + 1.0)
    assert (run.num_starts, run.most_workers) == (0, 1)


def test_equal_requests_that_come_too_fast_wait_by_what_each_adds() -> None:
    assert latencies(simulate(every(0.75, 12), TENTH, SPEC)) == pytest.approx(
        [1.0 + 0.25 * number for number in range(12)]
    )


def test_two_workers_serve_twice_as_fast_arrivals_without_waiting() -> None:
    run = simulate(every(0.5, 20), TENTH, fixed(SPEC, 2))
    assert latencies(run) == pytest.approx([1.0] * 20)
    assert run.worker_s == pytest.approx(2 * (19 * 0.5 + 1.0))


def test_random_arrivals_at_one_worker_wait_as_the_formula_says() -> None:
    speed, rate = Speed({1: 1.0}, picture_s=0.0), 0.6
    one_step = Mix(steps=((1, 1.0),), n=((1, 1.0),))
    arrivals = generated("poisson", rate=rate, seconds=4000, mix=one_step, seed=3)
    real = len(arrivals) / 4000
    found = statistics.fmean(latencies(simulate(arrivals, speed, SPEC)))
    assert found == pytest.approx(1 + real / (2 * (1 - real)), rel=0.1)


def test_a_short_request_overtakes_a_long_one_as_in_the_server() -> None:
    arrivals = [Arrival(0.0, 50), Arrival(0.05, 2)]
    long, short = latencies(simulate(arrivals, TENTH, SPEC))
    assert short == pytest.approx(0.05 + 0.2)  # the step under way, then its own two
    assert long == pytest.approx(5.2)


def test_requests_that_share_forwards_take_the_time_of_the_forward() -> None:
    speed = Speed({1: 0.1, 2: 0.12}, picture_s=0.5)
    run = simulate([Arrival(0.0, 10, n=2)], speed, SPEC)
    assert latencies(run) == pytest.approx([10 * 0.12 + 2 * 0.5])


def test_a_larger_picture_takes_as_much_longer_as_measured_or_as_it_has_pixels() -> None:
    speed = Speed({1: 0.1}, picture_s=0.0, own_size=(64, 64), ratios={(128, 64): 3.0})
    sizes = [(64, 64), (128, 64), (128, 128)]
    arrivals = [Arrival(100.0 * number, 10, size=size) for number, size in enumerate(sizes)]
    assert latencies(simulate(arrivals, speed, SPEC)) == pytest.approx([1.0, 3.0, 4.0])


def test_more_workers_are_never_slower() -> None:
    arrivals = generated("poisson", rate=2.5, seconds=120, mix=TEN_STEPS, seed=5)
    means = [statistics.fmean(latencies(simulate(arrivals, TENTH, fixed(SPEC, n)))) for n in (1, 2, 3, 4, 6)]
    assert means == sorted(means, reverse=True)
    assert means[-1] == pytest.approx(1.0, rel=0.05)


def test_the_same_arrivals_give_the_same_figures() -> None:
    arrivals = generated("bursty", rate=1.5, seconds=60, mix=Mix(), seed=5)
    first, second = (latencies(simulate(arrivals, TENTH, fixed(SPEC, 2))) for _ in range(2))
    assert first == second


def test_the_server_refuses_what_its_queue_does_not_take() -> None:
    spec = EndpointSettings(id="plan", max_queue_s=3.0)
    run = simulate(every(0.1, 50), TENTH, spec)
    found = summarize(run.measured, {(10, 1, None): 1.0})
    assert found["refused"]["429"] > 10
    assert found["latency_s"]["max"] < 6
    assert found["done"] + found["refused"]["429"] == 50


def test_the_load_decides_how_many_workers_there_are_and_what_they_cost() -> None:
    scaled = SPEC.model_copy(
        update={"min_replicas": 1, "max_replicas": 4, "scale_up_delay_s": 5.0, "scale_down_delay_s": 30.0}
    )
    speed = Speed({1: 0.1}, picture_s=0.0, load_s=4.0)
    step = [Arrival(60 + number / 3, 10) for number in range(360)]  # three workers' work for two minutes
    arrivals = [*every(10.0, 6), *step, *(Arrival(180 + 10.0 * number, 10) for number in range(30))]
    auto, one, four = (simulate(arrivals, speed, each) for each in (scaled, SPEC, fixed(SPEC, 4)))
    assert auto.most_workers >= 3
    assert auto.num_starts >= 2
    assert max(latencies(four)) < max(latencies(auto)) < max(latencies(one))
    assert auto.worker_s < 0.7 * four.worker_s, "it goes back when the load is over"
    assert latencies(auto)[-1] == pytest.approx(1.0)


def test_an_endpoint_that_sleeps_costs_nothing_meanwhile_and_its_waker_waits_for_the_load() -> None:
    asleep = SPEC.model_copy(update={"min_replicas": 0, "scale_down_delay_s": 10.0})
    speed = Speed({1: 0.1}, picture_s=0.0, load_s=4.0)
    run = simulate([Arrival(0.0, 10), Arrival(1000.0, 10)], speed, asleep)
    assert latencies(run) == pytest.approx([1.0, 5.0])
    assert run.worker_s == pytest.approx(1 + 10 + 4 + 1, abs=0.1)
    assert run.num_starts == 1


def test_the_fewest_workers_that_meet_an_objective_are_found() -> None:
    arrivals = generated("poisson", rate=2.5, seconds=200, mix=TEN_STEPS, seed=5)
    lone = lone_times(arrivals, TENTH, SPEC)
    assert lone == pytest.approx({(10, 1, None): 1.0})
    assert offered(arrivals, TENTH) == pytest.approx(len(arrivals) / arrivals[-1].at_s, rel=0.02)
    tried = list(search(SPEC, arrivals, TENTH, lone, Objective(p95_s=2.0), 64))
    assert [each["met"] for each in tried] == [False] * (len(tried) - 1) + [True]
    assert len(tried) > 1
    assert [each["max_workers"] for each in tried] == list(range(2, 2 + len(tried)))
    last = tried[-1]
    assert last["latency_s"]["p95"] <= 2.0
    assert last["worker_hours"] == pytest.approx(last["max_workers"] * last["seconds"] / 3600)


def test_a_refused_request_counts_against_every_objective() -> None:
    spec = EndpointSettings(id="plan", max_queue_s=3.0)
    lone: dict[Shape, float] = {(10, 1, None): 1.0}
    asked = [Objective(p95_s=60.0), Objective(within_3x=0.9), Objective(done=0.9)]
    assert not any(outcome(spec, every(0.1, 50), TENTH, lone, each)["met"] for each in asked)
    assert all(outcome(spec, every(2.0, 50), TENTH, lone, each)["met"] for each in asked)
