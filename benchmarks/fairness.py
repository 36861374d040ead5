"""Does a key with one request wait behind a key with two hundred?

    python -m benchmarks.fairness [--model SOURCE] [--threads N] [--queued 200]

One key queues 200 requests. Then another key sends one, ROUNDS times in a row while the others still wait.
Each may wait two service times, that is: take three times as long as it does alone.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics

import httpx2

from benchmarks.clients import patient
from benchmarks.serving import Running, body, many_connections, mezzotint_server, report

ROUNDS = 5
MAX_WAIT = 2.0
STEPS = 20
LONG = {"deadline_s": 3600.0, "max_queue_s": 3600.0}


async def queued(client: httpx2.AsyncClient, url: str) -> int:
    """Jobs that wait for a worker."""
    text = (await client.get(f"{url}/metrics")).text
    found = re.search(r'^mezzotint_queue_jobs\{endpoint="emoji"\} (\S+)$', text, re.MULTILINE)
    return int(float(found[1])) if found else 0


async def measure(server: Running, num_queued: int) -> tuple[float, list[tuple[float, int]]]:
    """Seconds alone, and per round: seconds beside the crowd, and how many waited then."""
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
            waiting = await queued(lone, server.url)
            one = await patient(lone, server.url, body("a cat", STEPS, seed))
            if one.status != 200:
                raise RuntimeError(f"the lone request failed: {one.status} {one.code}")
            rounds.append((one.seconds, waiting))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return alone_s, rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help="fake:step_s=0.02,size=128 needs no model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--queued", type=int, default=200)
    arguments = parser.parse_args()
    host = {"num_threads": arguments.threads, "endpoint": LONG, "server": {"auth": True}}
    with mezzotint_server(arguments.model, **host) as server:
        alone_s, rounds = asyncio.run(measure(server, arguments.queued))
    waits = [seconds / alone_s - 1 for seconds, _ in rounds]
    rows = [("alone, s", f"{alone_s:.3f}")]
    rows += [(f"beside {waiting} that wait, s", f"{seconds:.3f}") for seconds, waiting in rounds]
    rows += [("most that it waited, service times", f"{max(waits):.2f}")]
    facts = {"alone_s": round(alone_s, 3), "max_wait_service_times": round(max(waits), 2)}
    report("fairness", rows, facts | {"least_waiting": min(waiting for _, waiting in rounds)})
    return int(max(waits) > MAX_WAIT)


if __name__ == "__main__":
    raise SystemExit(main())
