"""When an idle worker measures again, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mezzotint.engine.calibration import Interrupted, Measurement
from mezzotint.engine.recheck import FIRST_S, Recheck
from mezzotint.engine.steps.scheduler import StepTimes
from mezzotint.spec import EngineSettings


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ScriptedEngine:
    """Has what Recheck asks of an engine; finds `found` when it measures again."""

    profile = SimpleNamespace(width=8, height=8)
    merges = True

    def __init__(self, known: Measurement, found: Measurement, best_rows: int | None = 4) -> None:
        self.runner = SimpleNamespace(mode="exact", num_rows=4)
        self.measured = [known]
        self.best_rows = best_rows
        self.found = found
        self.interrupted = False
        self.times = StepTimes()
        self.times.add(8, 8, known.forward_s)

    def measure_again(self, interrupted: Callable[[], bool], **_: Any) -> list[Measurement]:
        if interrupted():
            raise Interrupted
        self.best_rows = 4
        return [self.found]

    def info(self) -> Any:
        return SimpleNamespace(step_s=self.measured[0].forward_s, rows=self.runner.num_rows)


def recheck(engine: ScriptedEngine, clock: Clock) -> Recheck:
    return Recheck(cast(Any, engine), EngineSettings(), lambda: engine.interrupted, clock)


SURE, UNSURE = Measurement(1, 0.01, 0.02), Measurement(1, 0.03, 0.8)


def test_there_is_no_reason_to_measure_what_is_sure_and_shows_itself() -> None:
    assert recheck(ScriptedEngine(SURE, SURE), Clock()).due_s() is None


def test_an_uncertain_measurement_is_made_again_once_the_worker_is_idle() -> None:
    engine, clock = ScriptedEngine(UNSURE, SURE), Clock()
    again = recheck(engine, clock)
    assert again.due_s() == FIRST_S
    clock.now += 8
    again.worked()
    assert again.due_s() == FIRST_S, "a job came between"
    clock.now += FIRST_S
    assert again.due_s() == 0
    found = again.measure()
    assert found is not None
    assert (found.step_s, found.rows) == (0.01, 4), "R stays"
    assert engine.times.estimate(8, 8) == 0.01
    assert again.due_s() is None


@pytest.mark.parametrize("step_s", [0.004, 0.03])
def test_steps_that_contradict_a_sure_measurement_have_it_made_again(step_s: float) -> None:
    engine = ScriptedEngine(SURE, Measurement(1, step_s, 0.02))
    for _ in range(30):
        engine.times.add(8, 8, step_s)
    again = recheck(engine, Clock())
    assert again.due_s() == FIRST_S
    assert again.measure() is not None
    assert again.due_s() is None


def test_a_start_that_took_r_over_finds_out_what_the_others_would_give() -> None:
    engine = ScriptedEngine(SURE, SURE, best_rows=None)
    engine.runner.num_rows = 1
    again = recheck(engine, Clock())
    assert again.due_s() == FIRST_S
    assert again.measure() is not None
    assert (engine.runner.num_rows, engine.best_rows) == (1, 4)


def test_a_machine_that_stays_busy_is_measured_less_and_less_often() -> None:
    engine, clock = ScriptedEngine(UNSURE, UNSURE), Clock()
    again = recheck(engine, clock)
    pauses = []
    for _ in range(12):
        due = again.due_s()
        assert due is not None
        pauses.append(due)
        clock.now += due
        assert again.measure() is None
    assert pauses[:3] == [10, 20, 40]
    assert pauses[-1] == 3600


def test_a_message_ends_measuring() -> None:
    engine = ScriptedEngine(UNSURE, SURE)
    engine.interrupted = True
    again = recheck(engine, Clock())
    assert again.measure() is None
    assert engine.measured == [UNSURE]
    assert again.due_s() == FIRST_S


def test_a_model_whose_forward_would_keep_a_request_waiting_is_left_alone() -> None:
    slow = Measurement(1, 5.0, 0.5)
    assert recheck(ScriptedEngine(slow, slow), Clock()).due_s() is None
