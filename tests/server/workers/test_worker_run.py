"""Replicas over workers that are no processes: what is started, watched, killed and dropped, turn by turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from mezzotint.config import Settings
from mezzotint.fake_worker import model_info
from mezzotint.messages import Busy, FromWorker, LoadModel, Progress, Ready
from mezzotint.server.workers import policy
from mezzotint.server.workers.process import WorkerSettings
from mezzotint.server.workers.replica import Replica, ReplicaState
from tests.attacks import attack
from tests.server.fake_carrier import FakeCarrier, FakeProcess

PATIENCE_S = 10.0


@dataclass
class Stage:
    """One replica and all that it says."""

    carrier: FakeCarrier
    replica: Replica
    states: list[ReplicaState] = field(default_factory=list)
    messages: list[FromWorker] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    crashes: list[bool] = field(default_factory=list)
    """Of each worker that ended, whether it had crashed."""

    @property
    def process(self) -> FakeProcess:
        return self.carrier.started[-1]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.001)

    async def kill(self) -> None:
        """Kills the worker and waits until the replica has heard of it."""
        before = len(self.crashes)
        self.process.kill()
        await self.until(lambda: len(self.crashes) > before)

    async def until_state(self, state: ReplicaState) -> None:
        await self.until(lambda: self.replica.state is state)


def play(
    act: Callable[[Stage], Awaitable[None]], source: str = "fake", forgiven: int = 0, **values: float
) -> None:
    """Runs one test in an event loop of its own."""
    limits: dict[str, float] = {name: getattr(Settings(), name) for name in ("heartbeat_s", "load_timeout_s")}

    async def main() -> None:
        carrier = FakeCarrier()
        settings = WorkerSettings(carrier, **(limits | {"max_restarts": 2} | values))  # type: ignore[arg-type]

        def changed(replica: Replica) -> None:
            stage.states.append(replica.state)
            stage.failures += [replica.failure] if replica.failure else []

        def exited(replica: Replica, crashed: bool) -> int:
            stage.crashes.append(crashed)
            return forgiven

        replica = Replica(
            "one/1/0",
            settings,
            lambda: LoadModel("one", source),
            on_message=lambda _, message: stage.messages.append(message),
            on_change=changed,
            on_exit=exited,
        )
        stage = Stage(carrier, replica)
        await act(stage)
        await replica.stop()
        assert not carrier.alive, "a stopped replica leaves no worker behind"

    asyncio.run(main())


def test_a_worker_is_started_becomes_ready_and_is_stopped() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until_state(ReplicaState.READY)
        assert stage.replica.pid == stage.process.pid
        assert stage.replica.info is not None
        await stage.replica.stop()
        assert stage.states == [
            ReplicaState.STARTING, ReplicaState.READY, ReplicaState.STOPPING, ReplicaState.STOPPED,
        ]  # fmt: skip
        assert stage.crashes == [False]
        assert stage.replica.run is None
        assert stage.replica.info is not None, "what the model is stays known"

    play(act)


def test_a_run_is_dropped_whole_and_the_next_one_knows_nothing_of_it() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until_state(ReplicaState.READY)
        first, run = stage.process, stage.replica.run
        first.kill()
        await stage.until(lambda: stage.replica.is_ready and stage.process is not first)
        assert stage.replica.run is not run
        assert stage.replica.num_restarts == 1
        assert stage.replica.failure == "", "told until a worker is ready again"

    play(act)


def test_a_start_that_the_machine_refuses_is_tried_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "FIRST_PAUSE_S", 0.0001)
    monkeypatch.setattr(policy, "LONGEST_PAUSE_S", 0.001)

    async def act(stage: Stage) -> None:
        stage.carrier.errors = [OSError(24, "Too many open files") for _ in range(30)]
        stage.replica.start()
        await stage.until_state(ReplicaState.READY)
        assert "Too many open files" in stage.failures[0]
        assert ReplicaState.FAILED not in stage.states
        assert stage.crashes == [], "no worker ended"
        assert stage.replica.num_restarts == 30

    play(act, max_restarts=0)


def test_a_start_that_never_comes_back_is_given_up_after_the_time_for_loading() -> None:
    async def act(stage: Stage) -> None:
        stage.carrier.stuck = True
        stage.replica.start()
        await stage.until(lambda: stage.failures)
        assert "(stage: starting a worker)" in stage.failures[0]
        stage.carrier.stuck = False
        await stage.until_state(ReplicaState.READY)

    play(act, load_timeout_s=0.05)


def test_stopping_never_waits_for_a_start_that_does_not_come_back() -> None:
    async def act(stage: Stage) -> None:
        stage.carrier.stuck = True
        stage.replica.start()
        await asyncio.sleep(0.01)
        async with asyncio.timeout(1):
            await stage.replica.stop()
        assert stage.replica.state is ReplicaState.STOPPED

    play(act)


def test_stopping_in_the_pause_before_a_restart_ends_it() -> None:
    async def act(stage: Stage) -> None:
        stage.carrier.errors = [OSError("no")]
        stage.replica.start()
        await stage.until_state(ReplicaState.PAUSED)
        await stage.replica.stop()
        await asyncio.sleep(2 * policy.FIRST_PAUSE_S)
        assert stage.carrier.started == []

    play(act)


def test_a_worker_that_becomes_ready_while_it_is_stopped_is_not_taken_for_ready() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until(lambda: stage.carrier.started)
        stage.process.silent = True
        stopping = asyncio.ensure_future(stage.replica.stop())
        await stage.until_state(ReplicaState.STOPPING)
        stage.process.silent = False
        stage.process.say(Ready(model_info(LoadModel("one", "fake"), 8, 0.0), 0.0))
        await asyncio.sleep(0.01)
        stage.process.silent = True  # it never reads the Shutdown and has to be killed
        await stopping
        assert ReplicaState.READY not in stage.states

    play(act, "fake:load_s=100")


def test_a_silent_worker_is_killed_and_a_talkative_one_is_not() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until_state(ReplicaState.READY)
        first = stage.process
        await asyncio.sleep(0.3)
        assert first.alive, "it answers its pings"
        first.silent = True
        await stage.until(lambda: not first.alive)
        await stage.until(lambda: stage.failures)
        assert stage.failures[0] == "it said nothing for 0.1 s and was killed"

    play(act, heartbeat_s=0.1)


@attack("The whole server is stopped and goes on", outcome="healthy workers are not killed")
def test_a_healthy_worker_survives_a_pause_of_the_server() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until_state(ReplicaState.READY)
        for _ in range(3):
            time.sleep(0.4)  # the whole process stands still: suspended, swapped out, or blocked
            await asyncio.sleep(0.15)
        assert stage.carrier.alive == stage.carrier.started
        assert len(stage.carrier.started) == 1

    play(act, heartbeat_s=0.1)


def test_a_worker_that_loads_survives_a_pause_of_the_server() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until(lambda: stage.carrier.started)
        time.sleep(0.5)
        await stage.until_state(ReplicaState.READY)
        assert len(stage.carrier.started) == 1

    play(act, "fake:load_s=0.05", load_timeout_s=0.3, heartbeat_s=0.3)


def test_a_worker_hung_before_a_pause_of_the_server_is_still_found() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until_state(ReplicaState.READY)
        first = stage.process
        first.silent = True
        time.sleep(0.4)
        await stage.until(lambda: not first.alive)

    play(act, heartbeat_s=0.1)


def test_a_worker_busy_for_too_long_is_killed_and_the_reason_is_told() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until_state(ReplicaState.READY)
        stage.process.say(Busy(1.9))
        await asyncio.sleep(0.01)
        assert stage.process.alive
        stage.process.say(Busy(2.1))
        await stage.until(lambda: stage.failures)
        assert stage.failures[0] == "it was busy with one forward for 2 s and was killed"

    play(act, heartbeat_s=0.1)


def test_a_crash_loop_fails_the_replica_and_start_is_the_way_out() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        for _ in range(3):
            await stage.until_state(ReplicaState.READY)
            await stage.kill()
        await stage.until_state(ReplicaState.FAILED)
        assert stage.replica.failure.startswith("3 workers in a row died")
        stage.replica.start()
        assert stage.replica.failure == ""
        await stage.until_state(ReplicaState.READY)
        await stage.kill()
        await stage.until_state(ReplicaState.READY)

    play(act)


def test_deaths_that_the_dispatcher_lays_on_a_job_never_fail_the_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        for _ in range(5):
            await stage.until_state(ReplicaState.READY)
            await stage.kill()
        await stage.until_state(ReplicaState.READY)
        assert stage.crashes == [True] * 5

    play(act, forgiven=1, max_restarts=0)


def test_a_model_that_can_never_load_fails_at_once() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until_state(ReplicaState.FAILED)
        assert stage.replica.failure == "the fake model cannot be loaded"
        assert len(stage.carrier.started) == 1

    play(act, "fake:fail_load=permanent")


def test_what_a_worker_says_of_jobs_is_passed_on_and_what_it_says_of_itself_is_not() -> None:
    async def act(stage: Stage) -> None:
        stage.replica.start()
        await stage.until_state(ReplicaState.READY)
        stage.process.say(Busy(0.0))
        stage.process.say(Progress("job", 1, 2))
        await stage.until(lambda: stage.messages)
        assert stage.messages == [Progress("job", 1, 2)]

    play(act)
