"""Arrivals through the server's own endpoint, queue, admission and scaling, with simulated workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import sqlalchemy

from mezzotint.config import EndpointSettings, Settings
from mezzotint.errors import MezzotintError
from mezzotint.load.arrivals import Arrival
from mezzotint.load.generator import Measured, Sent, Shape
from mezzotint.server.metrics import Metrics
from mezzotint.server.store.keys import Key
from mezzotint.server.store.quotas import Quotas
from mezzotint.server.threads import Threads
from mezzotint.server.work.admission import Admission
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.lifecycle import Command, State
from mezzotint.server.work.tickets import Answer, Picture, Submission, Ticket
from mezzotint.server.workers.process import WorkerSettings
from mezzotint.sizing.speed import Speed
from mezzotint.sizing.virtual_time import VirtualLoop
from mezzotint.sizing.worker import SimulatedCarrier
from mezzotint.spec import ImageSpec

OK = 200
FOREVER_S = 1e9
"""Longer than any simulation: a simulated worker never hangs."""
STEPS = 20
"""Of an arrival that names none."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a run came to."""

    measured: Measured
    worker_s: float
    """Seconds that workers were there, loading included, from the beginning to the last answer."""
    num_starts: int
    """Workers started after the load began."""
    most_workers: int


class _AtOnce(Threads):
    """Runs its calls where they are made: a thread would not know of the virtual clock."""

    async def run(
        self, work: Callable[..., Result], *arguments: object, limit_s: float | None = None
    ) -> Result:
        return work(*arguments)


def simulate(arrivals: Sequence[Arrival], speed: Speed, spec: EndpointSettings) -> Simulated:
    """Sends each arrival at its moment to an endpoint with these settings, whose fewest workers are ready.

    All come from one key. Same arguments, same result.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_simulated(arrivals, speed, spec))


def lone_times(arrivals: Sequence[Arrival], speed: Speed, spec: EndpointSettings) -> dict[Shape, float]:
    """Seconds of each shape of request when one worker has nothing else to do."""
    patient = _with(spec, replicas=1, min_replicas=None, max_replicas=None, idle_sleep_s=0.0)
    patient = _with(patient, deadline_s=FOREVER_S, max_queue_s=FOREVER_S)
    shapes = dict.fromkeys(arrival.shape for arrival in arrivals)
    return {
        shape: simulate([Arrival(0.0, *shape)], speed, patient).measured.sent[0].seconds for shape in shapes
    }


def fixed(spec: EndpointSettings, workers: int) -> EndpointSettings:
    """The same endpoint with so many workers, always."""
    return _with(spec, replicas=workers, min_replicas=None, max_replicas=None, idle_sleep_s=0.0)


def _with(spec: EndpointSettings, **changes: object) -> EndpointSettings:
    return EndpointSettings.model_validate(spec.model_dump() | changes)


async def _simulated(arrivals: Sequence[Arrival], speed: Speed, spec: EndpointSettings) -> Simulated:
    loop = asyncio.get_running_loop()
    carrier, metrics = SimulatedCarrier(speed), Metrics()
    workers = WorkerSettings(carrier, heartbeat_s=FOREVER_S, load_timeout_s=FOREVER_S, max_restarts=0)
    endpoint = Endpoint(_with(spec, batching="exact"), workers, metrics)
    quotas = Quotas(sqlalchemy.create_engine("sqlite://"))  # never connected: a key without limits
    admission = Admission(Settings(), metrics, quotas, _AtOnce("simulation", 1, None))
    endpoint.obey(Command.START)
    await endpoint.wait_for(State.READY)
    while len(endpoint.current.ready) < len(endpoint.current.replicas):
        await endpoint.dispatcher.moved()
    began, num_before = loop.time(), len(carrier.workers)
    measured = Measured()

    async def one(number: int, arrival: Arrival) -> None:
        status, error = OK, ""
        try:
            ticket = await admission.submit(_submission(endpoint, number, arrival))
            with admission.attached(ticket):
                await ticket.outcome()
        except MezzotintError as refusal:
            status, error = refusal.status, refusal.message
        seconds = loop.time() - began - arrival.at_s
        measured.sent.append(
            Sent(arrival, 0.0, seconds + (speed.request_s if not error else 0.0), status, error)
        )

    tasks = []
    for number, arrival in enumerate(arrivals):
        if (pause_s := began + arrival.at_s - loop.time()) > 0:
            await asyncio.sleep(pause_s)
        tasks.append(loop.create_task(one(number, arrival)))
    await asyncio.gather(*tasks)
    ended = loop.time()
    measured.wall_s = ended - began
    spans = [(max(each.started_at, began), min(each.ended_at or ended, ended)) for each in carrier.workers]
    spans = [(start, end) for start, end in spans if end >= start]
    await endpoint.close()
    return Simulated(
        measured,
        sum(end - start for start, end in spans),
        len(carrier.workers) - num_before,
        _most_at_once(spans),
    )


def _submission(endpoint: Endpoint, number: int, arrival: Arrival) -> Submission:
    width, height = arrival.size or (None, None)
    spec = ImageSpec(prompt="", num_inference_steps=arrival.steps or STEPS, seed=0)
    return Submission(
        endpoint=endpoint,
        spec=replace(spec, width=width, height=height),
        num_images=arrival.n,
        key=Key("simulation", "simulation"),
        request_id=str(number),
        finish=_no_answer,
        fingerprint=str(number),
        gone=_stays,
        arrived=asyncio.get_running_loop().time(),
    )


def _no_answer(ticket: Ticket, pictures: list[Picture]) -> Answer:
    return Answer(b"")


async def _stays() -> bool:
    return False


def _most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    # At one moment an end counts before a start.
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
