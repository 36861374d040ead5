"""Does a key with one request wait behind a key with two hundred?

    python -m benchmarks.fairness [--model SOURCE] [--threads N] [--queued 200]

One key queues 200 requests. Then another key sends one, ROUNDS times in a row while the others still wait.
Each may wait two service times, measured in two ways, of which one must hold: it takes at most three times as
long as alone; or, since a full forward is slower than a lone one and a machine may be busy otherwise,
no more requests end meanwhile than three full forwards hold. Both figures are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
from dataclasses import dataclass

import httpx2

from benchmarks.clients import patient
from benchmarks.serving import Running, body, many_connections, mezzotint_server, report

ROUNDS = 5
MAX_WAIT = 2.0
STEPS = 20
LONG = {"deadline_s": 3600.0, "max_queue_s": 3600.0}


@dataclass(frozen=True, slots=True)
class Round:
    """One lone request beside the crowd."""

    seconds: float
    waiting: int
    """The crowd's requests that waited when it came."""
    overtook: int
    """Requests that ended before it, itself counted: the work done in that time."""

    def service_times(self, rows: int) -> float:
        """How many service times it waited before its own."""
        return self.overtook / rows - 1


async def metric(client: httpx2.AsyncClient, url: str, sample: str) -> int:
    text = (await client.get(f"{url}/metrics")).text
    found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    return int(float(found[1])) if found else 0


async def queued(client: httpx2.AsyncClient, url: str) -> int:
    """Jobs that wait for a worker."""
    return await metric(client, url, 'mezzotint_queue_jobs{endpoint="emoji"}')


async def ended(client: httpx2.AsyncClient, url: str) -> int:
    """Requests done so far."""
    return await metric(client, url, 'mezzotint_requests_total{endpoint="emoji",outcome="done"}')


async def measure(server: Running, num_queued: int) -> tuple[float, int, list[Round]]:
    """Seconds alone, rows of a forward, and the rounds."""
    _, crowd_key = server.new_key("crowd")
    _, lone_key = server.new_key("lone", admin=True)  # so that it may read the metrics
    async with many_connections(crowd_key) as crowd, many_connections(lone_key) as lone:
        alone = [await patient(lone, server.url, body("a cat", STEPS, seed)) for seed in range(5)]
        alone_s = statistics.median(one.seconds for one in alone)
        tasks = [
            asyncio.create_task(patient(crowd, server.url, body("crowd", STEPS, seed)))
            for seed in range(num_queued)
        ]
        while await queued(lone, server.url) < num_queued * 0.9 and not tasks[-1].done():
            await asyncio.sleep(0.02)
        rounds = []
        for seed in range(ROUNDS):
            waiting, before = await queued(lone, server.url), await ended(lone, server.url)
            one = await patient(lone, server.url, body("a cat", STEPS, seed))
            if one.status != 200:
                raise RuntimeError(f"the lone request failed: {one.status} {one.code}")
            rounds.append(Round(one.seconds, waiting, await ended(lone, server.url) - before))
        spec = (await lone.get(f"{server.url}/dedicated/beta/endpoint/emoji")).json()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return alone_s, int(spec["mezzotint"]["info"]["rows"]), rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help="fake:step_s=0.02,size=128 needs no model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--queued", type=int, default=200)
    arguments = parser.parse_args()
    host = {"num_threads": arguments.threads, "endpoint": LONG, "server": {"auth": True}}
    with mezzotint_server(arguments.model, **host) as server:
        alone_s, num_rows, rounds = asyncio.run(measure(server, arguments.queued))
    waits = [one.service_times(num_rows) for one in rounds]
    slower = max(one.seconds for one in rounds) / alone_s
    rows = [("alone, s", f"{alone_s:.3f}"), ("rows of a forward", str(num_rows))]
    rows += [
        (f"beside {one.waiting} that wait, s", f"{one.seconds:.3f}, {one.overtook} ended meanwhile")
        for one in rounds
    ]
    rows += [
        ("most that it waited, service times", f"{max(waits):.2f}"),
        ("most that it took, times alone", f"{slower:.2f}"),
    ]
    facts = {"alone_s": round(alone_s, 3), "rows": num_rows, "max_times_alone": round(slower, 2)}
    facts |= {"max_wait_service_times": round(max(waits), 2)}
    report("fairness", rows, facts | {"least_waiting": min(one.waiting for one in rounds)})
    return int(min(max(waits), slower - 1) > MAX_WAIT)


if __name__ == "__main__":
    raise SystemExit(main())
