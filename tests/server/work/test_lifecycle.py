"""Every pair and triple of commands, with requests in between, over workers that are no processes.

Whatever the order and the timing: the last command wins, every request ends once and as it should, and no
worker is left that nobody wants.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import pytest
import structlog

from mezzotint.errors import (
    ConflictError,
    GenerationError,
    MezzotintError,
    RequestCancelledError,
    UnavailableError,
)
from mezzotint.messages import Done, Generate
from mezzotint.server.metrics import Metrics
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.lifecycle import LIFE_CYCLE, Action, Command, Desired, State
from mezzotint.server.work.queueing import Job
from mezzotint.server.workers import policy
from mezzotint.server.workers.process import WorkerSettings
from mezzotint.spec import ImageSpec
from tests.attacks import attack
from tests.server.fake_carrier import FakeCarrier
from tests.server.hosting import endpoint as settings_of

PATIENCE_S = 10.0
GOOD = "fake:load_s=0.0005"
BAD = "fake:load_s=0.0005,fail_load=permanent"
RESTING = {Desired.RUNNING: State.READY, Desired.SLEEPING: State.SLEEPING, Desired.TERMINATED: State.STOPPED}


class Event(StrEnum):
    """What may happen to an endpoint."""

    START = "start"
    SLEEP = "sleep"
    RESTART = "restart"
    TERMINATE = "terminate"
    END = "terminate at once"
    UPDATE = "update"
    BAD_UPDATE = "update that cannot load"
    KILL = "a worker dies"


COMMANDS = {
    Event.START: (Command.START, math.inf),
    Event.SLEEP: (Command.SLEEP, math.inf),
    Event.RESTART: (Command.RESTART, math.inf),
    Event.TERMINATE: (Command.TERMINATE, math.inf),
    Event.END: (Command.TERMINATE, 0.0),
}


@dataclass
class Stage:
    """One endpoint, its workers, and the requests that it was given."""

    carrier: FakeCarrier
    endpoint: Endpoint
    outcomes: dict[str, list[Done | MezzotintError]] = field(default_factory=dict)
    mayend: set[str] = field(default_factory=set)
    """Requests that were there when the endpoint was ended at once."""
    wanted: Desired = Desired.RUNNING
    good: int = 1
    """The version that a running endpoint ends with: the newest, or the last that worked before a bad one."""
    num_kills: int = 0
    versions: int = 1
    given_up: list[int] = field(default_factory=list)

    def request(self, steps: int = 3) -> None:
        """Sends a request, if the endpoint takes any."""
        try:
            self.endpoint.require_available()
        except UnavailableError:
            assert self.wanted is Desired.TERMINATED, self.endpoint.state
            return
        if self.wanted is Desired.SLEEPING:
            self.wanted = Desired.RUNNING
        name = f"job {len(self.outcomes)}"
        self.outcomes[name] = []
        now = asyncio.get_running_loop().time()
        message = Generate(name, ImageSpec(prompt=name, num_inference_steps=steps, seed=1))
        job = Job(
            message, f"key {len(self.outcomes)}", 1.0, 0, 0.1, now + 1e6,
            on_end=lambda job, outcome: self.outcomes[name].append(outcome),
            on_progress=lambda job: None,
            on_preview=lambda job, preview: None,
        )  # fmt: skip
        self.endpoint.enqueue(job, now)

    def happen(self, event: Event) -> None:
        if event is Event.KILL:
            self.num_kills += 1
            for process in self.carrier.alive[:1]:
                process.kill()
            return
        try:
            if event in COMMANDS:
                command, drain_s = COMMANDS[event]
                self.endpoint.obey(command, drain_s=drain_s)
                self.wanted = self.endpoint.desired
            else:
                worked = self.last_that_worked()
                model = GOOD if event is Event.UPDATE else BAD
                self.endpoint.update(settings_of(model), self.versions + 1)
                self.versions += 1
                self.good = self.versions if event is Event.UPDATE else worked
        except ConflictError:
            terminated = self.wanted is Desired.TERMINATED and event in (Event.START, Event.SLEEP)
            updating = event in (Event.UPDATE, Event.BAD_UPDATE) and self.endpoint.next is not None
            assert terminated or updating
        if event is Event.END:
            self.mayend |= {name for name, outcomes in self.outcomes.items() if not outcomes}

    def last_that_worked(self) -> int:
        if self.endpoint.current.proven:
            return self.endpoint.current.version
        return self.endpoint._fallback[0] if self.endpoint._fallback else 0

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0)

    async def until_at_rest(self) -> None:
        """Waits for the state that is wanted, with every request ended and nothing under way."""
        endpoint = self.endpoint
        await self.until(
            lambda: (
                endpoint.state is RESTING[self.wanted]
                and endpoint.next is None
                and all(self.outcomes.values())
                and len(self.carrier.alive) == len(endpoint.current.ready)
            )
        )

    def check(self) -> None:
        for name, outcomes in self.outcomes.items():
            assert len(outcomes) == 1, f"{name} ended {len(outcomes)} times"
            dropped = isinstance(outcomes[0], RequestCancelledError) and name in self.mayend
            guilty = isinstance(outcomes[0], GenerationError) and self.num_kills > 1  # twice at one step
            assert isinstance(outcomes[0], Done) or dropped or guilty, f"{name} ended with {outcomes[0]!r}"
        running = self.wanted is Desired.RUNNING
        assert len(self.carrier.alive) == (1 if running else 0)
        assert self.endpoint.desired is self.wanted
        if running:
            assert self.endpoint.current.version == self.good
            assert self.carrier.alive[0].load is not None
            assert self.carrier.alive[0].load.source == GOOD


async def with_stage(
    act: Callable[[Stage], Awaitable[None]], exit_s: float = 0.001, max_restarts: int = 2
) -> None:
    carrier = FakeCarrier(exit_s)
    workers = WorkerSettings(carrier, heartbeat_s=30, load_timeout_s=30, max_restarts=max_restarts)
    given_up: list[int] = []
    endpoint = Endpoint(
        settings_of(GOOD), workers, METRICS, on_given_up=lambda _, version: given_up.append(version)
    )
    stage = Stage(carrier, endpoint, given_up=given_up)
    try:
        await act(stage)
    finally:
        await endpoint.close()
    assert not carrier.alive


def play(act: Callable[[Stage], Awaitable[None]]) -> None:
    asyncio.run(with_stage(act))


METRICS = Metrics()


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(policy, "FIRST_PAUSE_S", 0.0001)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


async def ready(stage: Stage) -> None:
    stage.endpoint.obey(Command.START)
    await stage.until(lambda: stage.endpoint.state is State.READY)


# ---------------------------------------------------------------- all orders


def test_the_table_says_something_for_every_state_and_command() -> None:
    assert set(LIFE_CYCLE) == set(State)
    assert all(set(row) == set(Command) for row in LIFE_CYCLE.values())
    assert {action for row in LIFE_CYCLE.values() for action in row.values()} == set(Action)


TIMINGS = {
    "at once": 0,
    "some turns later": 7,
    "when the workers are ending": -1,
}


@attack(
    "Every triple of commands, with requests in between",
    outcome="the last one wins; no worker and no request is lost",
)
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("first", Event)
def test_every_triple_of_commands_ends_in_what_the_last_one_wants(first: Event, timing: str) -> None:
    async def all_triples() -> None:
        for second, third in itertools.product(Event, Event):
            try:
                await with_stage(
                    lambda stage: triple(stage, (first, second, third), TIMINGS[timing]),  # noqa: B023
                    max_restarts=3,  # three kills are no crash loop, however early they come
                )
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"{first} / {second} / {third}, {timing}: {error!r}") from error

    asyncio.run(all_triples())


async def triple(stage: Stage, events: tuple[Event, ...], turns: int) -> None:
    await ready(stage)
    for event in events:
        stage.request()
        await let_pass(stage, turns)
        stage.happen(event)
        await let_pass(stage, turns)
        stage.request()
    await stage.until_at_rest()
    stage.check()


async def let_pass(stage: Stage, turns: int) -> None:
    if turns >= 0:
        for _ in range(turns):
            await asyncio.sleep(0)
        return
    moving = (State.READY, State.STOPPING, State.SLEEPING, State.STOPPED, State.FAILED)
    await stage.until(lambda: stage.endpoint.state in moving)


@pytest.mark.parametrize("source", [GOOD, "fake:load_s=0.02"], ids=["quick", "slow"])
def test_every_pair_of_commands_to_an_endpoint_that_starts_ends_in_what_the_last_wants(
    source: str,
) -> None:
    events = [event for event in Event if event is not Event.BAD_UPDATE]  # nothing has worked yet

    async def pair(stage: Stage, pair: tuple[Event, ...], turns: int) -> None:
        stage.endpoint.obey(Command.START)
        for event in pair:
            stage.request()
            stage.happen(event)
            await let_pass(stage, turns)
        await stage.until_at_rest()
        stage.check()

    async def all_pairs() -> None:
        for events_, turns in itertools.product(itertools.product(events, events), (0, 1, 7)):
            try:
                await with_stage(lambda stage: pair(stage, events_, turns))  # noqa: B023
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"{' / '.join(events_)}, {turns} turns: {error!r}") from error

    asyncio.run(all_pairs())


# ---------------------------------------------------------------- what used to go wrong, each by itself


@attack("Restart, then delete, of an endpoint that starts", outcome="no worker is left")
def test_restart_then_delete_of_a_starting_endpoint_leaves_no_worker() -> None:
    async def act(stage: Stage) -> None:
        stage.endpoint.obey(Command.START)
        await stage.until(lambda: stage.carrier.started)
        stage.endpoint.obey(Command.RESTART)
        stage.endpoint.obey(Command.TERMINATE, drain_s=0)
        assert await stage.endpoint.settled() is State.STOPPED
        assert not stage.carrier.alive

    play(act)


def test_restart_then_terminate_terminates() -> None:
    async def act(stage: Stage) -> None:
        stage.endpoint.obey(Command.START)
        stage.endpoint.obey(Command.RESTART)
        await asyncio.sleep(0)
        stage.endpoint.obey(Command.TERMINATE)
        assert await stage.endpoint.settled() is State.STOPPED

    play(act)


@attack("Terminate, then restart, during requests", outcome="none ends by it")
@pytest.mark.parametrize("command", [Command.TERMINATE, Command.SLEEP])
def test_restart_in_a_drain_ends_no_running_request(command: Command) -> None:
    async def act(stage: Stage) -> None:
        await ready(stage)
        stage.request(steps=30)
        await asyncio.sleep(0.002)
        for _ in range(2):
            stage.endpoint.obey(command)
            assert stage.endpoint.state is State.DRAINING
            await asyncio.sleep(0)
            stage.endpoint.obey(Command.RESTART)
            await asyncio.sleep(0)
        assert stage.endpoint.state is State.READY
        stage.wanted = Desired.RUNNING
        first = stage.carrier.started[0]
        await stage.until_at_rest()
        stage.check()
        assert not first.alive, "the restart gave a new worker"

    play(act)


def test_the_end_of_a_drain_drops_what_is_left_and_only_then() -> None:
    async def act(stage: Stage) -> None:
        await ready(stage)
        stage.request(steps=10**6)
        stage.endpoint.obey(Command.TERMINATE, drain_s=0.05)
        await asyncio.sleep(0.02)
        assert stage.endpoint.state is State.DRAINING
        assert await stage.endpoint.settled() is State.STOPPED
        (outcome,) = stage.outcomes["job 0"]
        assert isinstance(outcome, RequestCancelledError)

    play(act)


@attack("An update that cannot load, to a sleeping endpoint", outcome="the version that works is kept")
def test_an_update_sent_while_asleep_that_cannot_load_leaves_the_version_that_works() -> None:
    async def act(stage: Stage) -> None:
        await ready(stage)
        stage.endpoint.obey(Command.SLEEP)
        assert await stage.endpoint.settled() is State.SLEEPING
        stage.happen(Event.BAD_UPDATE)
        assert stage.endpoint.state is State.SLEEPING
        assert stage.endpoint.current.version == 2, "the next start tries it"
        stage.wanted = Desired.SLEEPING
        stage.request()
        await stage.until_at_rest()
        stage.check()
        assert stage.endpoint.update_failure == "the fake model cannot be loaded"
        assert stage.given_up == [2]

    play(act)


def test_an_update_of_a_starting_endpoint_does_not_wait_for_the_old_version() -> None:
    async def act(stage: Stage) -> None:
        stage.endpoint.update(settings_of("fake:load_s=1000"), 2)
        stage.endpoint.obey(Command.START)
        await stage.until(lambda: stage.carrier.started)
        stage.versions = 2
        stage.happen(Event.UPDATE)
        await stage.until_at_rest()
        stage.check()

    play(act)


def test_a_failed_update_beside_a_running_version_is_given_up_once_and_restart_keeps_what_works() -> None:
    async def act(stage: Stage) -> None:
        await ready(stage)
        stage.happen(Event.BAD_UPDATE)
        await stage.until(lambda: stage.endpoint.update_failure)
        stage.happen(Event.RESTART)
        await stage.until_at_rest()
        stage.check()
        assert stage.given_up == [2]
        assert stage.endpoint.update_failure == ""

    play(act)


def test_an_update_comes_through_although_the_old_workers_fail_for_good_meanwhile() -> None:
    async def act(stage: Stage) -> None:
        await ready(stage)
        stage.endpoint.update(settings_of("fake:load_s=0.05"), 2)
        for _ in range(3):
            await stage.until(lambda: stage.endpoint.current.ready)
            assert stage.endpoint.current.version == 1
            pid = stage.endpoint.current.replicas[0].pid
            next(process for process in stage.carrier.alive if process.pid == pid).kill()
            await stage.until(lambda: not stage.endpoint.current.ready)
        await stage.until(lambda: stage.endpoint.current.version == 2)
        assert stage.endpoint.state is State.STARTING
        stage.good = 2
        stage.request()
        await stage.until(lambda: stage.endpoint.state is State.READY)
        await stage.until(lambda: all(stage.outcomes.values()))

    play(act)


def test_a_job_is_not_charged_with_the_end_of_a_worker_that_was_told_to_stop() -> None:
    async def act(stage: Stage) -> None:
        await ready(stage)
        stage.request(steps=10**6)
        await asyncio.sleep(0.002)
        replica = stage.endpoint.current.replicas[0]
        (job,) = stage.endpoint.dispatcher._held[replica].values()
        await replica.stop()
        assert (job.deaths, job.queued) == (0, True)

    play(act)
