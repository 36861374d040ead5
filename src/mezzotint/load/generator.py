"""Sends arrivals at their moments, and measures what a lone request takes. One attempt each, no retries.

It is open-loop: a slow server does not slow the arrivals down. Where this process itself is too slow for
that, `lateness_s` and `lag_s` say so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2

from mezzotint.errors import ConnectionFailedError, MezzotintError
from mezzotint.load.arrivals import Arrival, Size

Api = Literal["mezzotint", "openai"]
LAG_EVERY_S = 0.05
LONE_ROUNDS = 2
"""A lone time is the least of so many: what disturbs it only makes it longer."""
MAX_LONE_SHAPES = 24
NO_ANSWER = 0
"""The status of a request whose connection failed, or that took longer than the limit."""
PROMPTS = ("a red apple on a teal background", "an owl on a yellow background", "a rocket", "a happy cat")
Shape = tuple[int | None, int, Size]
Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Target:
    """The server, as requests name it."""

    url: str
    model: str
    api: Api = "mezzotint"
    key: str = ""
    timeout_s: float = 600.0

    @property
    def address(self) -> str:
        base = self.url.rstrip("/")
        if self.api == "mezzotint":
            return f"{base}/dedicated/v1/images/generations"
        return f"{base.removesuffix('/v1')}/v1/images/generations"

    def body(self, arrival: Arrival) -> dict[str, Any]:
        """The request: through `openai` what that API has, with steps and seed only where steps are set."""
        model = f"{self.model}:{arrival.adapter}" if arrival.adapter else self.model
        prompt = PROMPTS[arrival.seed % len(PROMPTS)]
        fields: dict[str, Any] = {"model": model, "prompt": prompt, "n": arrival.n}
        if arrival.steps is not None:
            fields |= {"num_inference_steps": arrival.steps, "seed": arrival.seed}
        if self.api == "openai":
            size = {"size": "{}x{}".format(*arrival.size)} if arrival.size else {}
            return fields | size | {"response_format": "b64_json"}
        if arrival.size:
            fields["width"], fields["height"] = arrival.size
        return fields | {"response_format": "png"}


@dataclass(frozen=True, slots=True)
class Sent:
    """One request and what came of it."""

    arrival: Arrival
    late_s: float
    """How long after its moment it was sent."""
    seconds: float
    """From its moment to the last byte of the answer: being sent late counts as waiting."""
    status: int
    error: str = ""


@dataclass(slots=True)
class Measured:
    """What a run has measured so far."""

    sent: list[Sent] = field(default_factory=list)
    unfinished: int = 0
    """Requests without an answer when the run was stopped."""
    lag_s: list[float] = field(default_factory=list)
    """By how much this process's event loop overslept."""
    wall_s: float = 0.0
    processor_s: float = 0.0
    """Of this process."""
    stopped: bool = False


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that queues nothing on its own side."""
    headers = {"authorization": f"Bearer {target.key}"} if target.key else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(limits=limits, headers=headers, timeout=target.timeout_s) as client:
        yield client


async def _send(client: httpx2.AsyncClient, target: Target, arrival: Arrival) -> tuple[int, str]:
    """Status and what the server said of a failure."""
    try:
        async with asyncio.timeout(target.timeout_s):
            answer = await client.post(target.address, json=target.body(arrival))
    except TimeoutError:
        return NO_ANSWER, f"no answer within {target.timeout_s:g} s"
    except httpx2.HTTPError as error:
        return NO_ANSWER, str(error) or type(error).__name__
    return answer.status_code, "" if answer.is_success else answer.text[:200]


async def lone_times(
    target: Target, arrivals: Sequence[Arrival], told: Told | None = None
) -> dict[Shape, float]:
    """Least seconds of each shape of request when nothing else is asked for, the commonest shapes only.

    `told(done, all)` hears of progress. ConnectionFailedError and MezzotintError say why the server
    cannot be measured.
    """
    counts: dict[Shape, int] = {}
    for arrival in arrivals:
        counts[arrival.shape] = counts.get(arrival.shape, 0) + 1
    shapes = sorted(counts, key=lambda shape: -counts[shape])[:MAX_LONE_SHAPES]
    found: dict[Shape, float] = {}
    async with connected(target) as client:
        for place, (steps, n, size) in enumerate(shapes):
            lone = Arrival(0.0, steps, n, size, seed=place)
            if not place:
                await _require_answer(client, target, lone)  # also wakes and warms the server
            times = []
            for _ in range(LONE_ROUNDS):
                began = time.perf_counter()
                await _require_answer(client, target, lone)
                times.append(time.perf_counter() - began)
            found[steps, n, size] = min(times)
            if told:
                told(place + 1, len(shapes))
    return found


async def _require_answer(client: httpx2.AsyncClient, target: Target, lone: Arrival) -> None:
    status, error = await _send(client, target, lone)
    if status == NO_ANSWER:
        raise ConnectionFailedError(f"{target.address} does not answer a lone request ({error})")
    if not 200 <= status < 300:
        raise MezzotintError(f"{target.address} refuses a lone request with {status}: {error}")


def lone_time(times: Mapping[Shape, float], shape: Shape) -> float:
    """The measured time of a shape, else that of the nearest by work, in proportion to it."""
    if shape in times:
        return times[shape]
    work = _work(shape)
    near = min(times, key=lambda other: abs(_work(other) - work))
    return times[near] * work / _work(near)


def _work(shape: Shape) -> float:
    steps, n, size = shape
    pixels = size[0] * size[1] if size else 512 * 512
    return (steps or 20) * n * pixels


async def run(target: Target, arrivals: Sequence[Arrival], told: Told | None = None) -> Measured:
    """Sends each request at its moment; cancelled (Ctrl-C), it returns what was measured until then.

    `told(ended, all)` hears of each request that has ended.
    """
    measured = Measured()
    tasks: set[asyncio.Task[None]] = set()
    num_sent = 0
    began, processor = time.perf_counter(), time.process_time()

    async def one(client: httpx2.AsyncClient, arrival: Arrival) -> None:
        late_s = time.perf_counter() - began - arrival.at_s
        status, error = await _send(client, target, arrival)
        seconds = time.perf_counter() - began - arrival.at_s
        measured.sent.append(Sent(arrival, max(0.0, late_s), seconds, status, error))
        if told:
            told(len(measured.sent), len(arrivals))

    lag = asyncio.create_task(_watch_lag(measured.lag_s))
    try:
        async with connected(target) as client:
            for arrival in arrivals:
                pause_s = arrival.at_s - (time.perf_counter() - began)
                if pause_s > 0:
                    await asyncio.sleep(pause_s)
                task = asyncio.create_task(one(client, arrival))
                num_sent += 1
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        measured.stopped, measured.unfinished = True, num_sent - len(measured.sent)
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        lag.cancel()
        measured.wall_s = time.perf_counter() - began
        measured.processor_s = time.process_time() - processor
    return measured


async def _watch_lag(found: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(LAG_EVERY_S)
        found.append(max(0.0, time.perf_counter() - began - LAG_EVERY_S))
