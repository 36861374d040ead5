"""Ten times what the server can do, for a minute: who is admitted, who is refused, and is the refusal true?

    python -m benchmarks.overload [--seconds 60] [--model SOURCE] [--threads N]

Every request has a deadline of DEADLINE_S. Those admitted must meet it; the others must get 429 at once. Then
a request right after the last one: how long until it is admitted? Then, ROUNDS times: the queue is filled, a
large request is refused with a Retry-After, nothing else is sent, and the large request is tried again and
again until it is admitted. The time that this took is what Retry-After should have said.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx2

from benchmarks.clients import PATH, Outcome, capacity, patient
from benchmarks.serving import Body, Running, body, many_connections, mezzotint_server, report
from mezzotint.load.results import percentile

TIMES = 10
DEADLINE_S = 12.0
REFUSED_WITHIN_S = 0.05
PROBE_EVERY_S = 0.02
REQUESTS = "/dedicated/v1/requests/"
ROUNDS = 5
HEADERS = {"x-request-timeout-s": f"{DEADLINE_S:g}", "prefer": "respond-async"}
SMALL = body("a red apple", 8, 0)


@dataclass(slots=True)
class Refusal:
    """What a Retry-After said, and after how long the request was admitted in truth."""

    said_s: float
    true_s: float

    @property
    def right(self) -> bool:
        """Within a factor of two; the header knows whole seconds only, so 1 also stands for less."""
        return self.true_s / 2 <= self.said_s <= max(1.0, 2 * self.true_s)


@dataclass(slots=True)
class Found:
    per_s: float = 0.0
    service_s: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    recovered_s: float = 0.0
    refusals: list[Refusal] = field(default_factory=list)


async def flood(
    client: httpx2.AsyncClient, url: str, per_s: float, seconds: float
) -> list[asyncio.Task[Outcome]]:
    """Requests that arrive by chance at this rate for this long."""
    dice = random.Random(10)
    tasks = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        one = SMALL | {"seed": dice.randrange(2**32)}
        tasks.append(asyncio.create_task(patient(client, url, one, timeout_s=DEADLINE_S)))
        await asyncio.sleep(dice.expovariate(per_s))
    return tasks


async def admitted_after(client: httpx2.AsyncClient, url: str, one: Body) -> Refusal:
    """Tries until the request is admitted, and takes it back; what the first refusal said (0: none)."""
    said_s, began = 0.0, time.perf_counter()
    while True:
        answer = await client.post(url + PATH, json=one, headers=HEADERS)
        passed_s = time.perf_counter() - began
        if answer.status_code == 202:
            await client.delete(f"{url}{REQUESTS}{answer.json()['id']}")
            return Refusal(said_s, passed_s)
        if answer.status_code != 429:
            raise RuntimeError(f"neither admitted nor refused with 429: {answer.status_code} {answer.text}")
        said_s = said_s or float(answer.headers["retry-after"])
        await asyncio.sleep(PROBE_EVERY_S)


async def refused(client: httpx2.AsyncClient, url: str, large: Body) -> Refusal:
    """Fills the queue, then waits with a large request for what its Retry-After said; empties the queue."""
    filled: list[str] = []
    full = False
    while not full:
        several = [
            client.post(url + PATH, json=SMALL | {"seed": len(filled) + number}, headers=HEADERS)
            for number in range(16)
        ]
        answers = await asyncio.gather(*several)
        filled += [answer.json()["id"] for answer in answers if answer.status_code == 202]
        full = any(answer.status_code != 202 for answer in answers)
    found = await admitted_after(client, url, large)
    for request_id in filled:
        await client.delete(f"{url}{REQUESTS}{request_id}")
    return found


async def idle(client: httpx2.AsyncClient, url: str) -> None:
    """Waits until nothing is queued or running."""
    while True:
        text = (await client.get(f"{url}/metrics")).text
        if all(f'mezzotint_{name}_jobs{{endpoint="emoji"}} 0.0' in text for name in ("queue", "running")):
            return
        await asyncio.sleep(0.1)


async def large_body(client: httpx2.AsyncClient, url: str) -> Body:
    """A request that takes about half of DEADLINE_S alone, where eight images of fifty steps take as long."""
    one = body("a large request", 50, 1)
    lone = await patient(client, url, one)
    several = await patient(client, url, one | {"n": 4})
    each_s = max(several.seconds / 4, 1e-3)
    return one | {"n": 1 if lone.seconds > DEADLINE_S / 2 else max(1, min(8, round(DEADLINE_S / 2 / each_s)))}


async def measure(server: Running, seconds: float) -> Found:
    found = Found()
    found.per_s = await capacity(server.url, None, [SMALL], min(15.0, seconds / 2))
    async with many_connections() as client:
        found.service_s = (await patient(client, server.url, SMALL)).seconds
        tasks = await flood(client, server.url, TIMES * found.per_s, seconds)
        found.recovered_s = (await admitted_after(client, server.url, SMALL)).true_s
        found.outcomes = list(await asyncio.gather(*tasks))
        await idle(client, server.url)
        large = await large_body(client, server.url)
        for _ in range(ROUNDS):
            found.refusals.append(await refused(client, server.url, large))
            await idle(client, server.url)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--model", default="emoji", help="fake:step_s=0.2,size=128 needs no model")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with mezzotint_server(arguments.model, num_threads=arguments.threads) as server:
        found = asyncio.run(measure(server, arguments.seconds))
    return show(found)


def show(found: Found) -> int:
    """Prints the findings; 1 when one of them is not what was promised."""
    refused = [one for one in found.outcomes if one.status == 429]
    admitted = [one for one in found.outcomes if one.status != 429]
    met = [one for one in admitted if one.status == 200 and one.seconds <= DEADLINE_S]
    other = [one for one in admitted if one.status not in (200, 504)]
    share = len(met) / max(1, len(admitted))
    slowest = percentile([one.seconds for one in refused], 99) if len(refused) > 1 else float("inf")
    right = sum(one.right for one in found.refusals)
    facts: Mapping[str, float | int | str] = {
        "capacity, requests/s": round(found.per_s, 2),
        "one request alone, s": round(found.service_s, 3),
        "sent": len(found.outcomes),
        "admitted": len(admitted),
        "of these done within their deadline, %": round(100 * share, 2),
        "of these answered otherwise than 200 or 504": len(other),
        "refused with 429": len(refused),
        "refused within, p99 ms": round(1000 * slowest, 1),
        "admitted again after the last, s": round(found.recovered_s, 3),
        "Retry-After said, s": " ".join(f"{one.said_s:.0f}" for one in found.refusals),
        "and was in truth, s": " ".join(f"{one.true_s:.1f}" for one in found.refusals),
        "right within a factor of two": f"{right} of {len(found.refusals)}",
    }
    report("overload", [(name, str(value)) for name, value in facts.items()], facts)
    kept = share >= 0.99 and not other and slowest <= REFUSED_WITHIN_S and right == len(found.refusals)
    return int(not kept or found.recovered_s > found.service_s)


if __name__ == "__main__":
    raise SystemExit(main())
