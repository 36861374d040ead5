"""Do short requests wait behind long ones?

    python -m benchmarks.short_among_long [--model SOURCE] [--requests N] [--threads N] [--dtype bf16|fp32]

Requests arrive at random (Poisson); every sixth asks for 50 steps, the others for 4. The rate is set to 0.8
of what the first-in-first-out baseline can do, from its own measured service times, and both servers get the
same requests at the same moments, one server after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time

import httpx2

from benchmarks.serving import (
    BUILT_IN,
    Body,
    baseline_server,
    body,
    many_connections,
    mezzotint_server,
    post,
    report,
)
from mezzotint.load.results import percentile

LOAD = 0.8
SHORT, LONG = 4, 50
EVERY = 6
"""Each so-many-th request is a long one."""


async def service_time(client: httpx2.AsyncClient, url: str, steps: int) -> float:
    """Median seconds of a lone request."""
    return statistics.median(
        [(await post(client, url, body("a cat", steps, seed))).seconds for seed in range(5)]
    )


async def calibrate(url: str) -> float:
    """Requests per second that keep a server which takes one at a time busy for LOAD of the time."""
    async with many_connections() as client:
        await post(client, url, body("a cat", SHORT, 0))  # warm
        short, long = await service_time(client, url, SHORT), await service_time(client, url, LONG)
    return LOAD / (((EVERY - 1) * short + long) / EVERY)


def schedule(rate: float, num_requests: int) -> list[tuple[float, Body]]:
    """Moments of arrival in seconds, and what arrives; always the same for one rate."""
    dice = random.Random(6)
    moment, arrivals = 0.0, []
    for number in range(num_requests):
        moment += dice.expovariate(rate)
        steps = LONG if number % EVERY == EVERY - 1 else SHORT
        arrivals.append((moment, body("a happy cat", steps, number)))
    return arrivals


async def replay(url: str, arrivals: list[tuple[float, Body]]) -> dict[int, list[float]]:
    """Seconds of every answer, by number of steps."""
    seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
    async with many_connections() as client:
        began = time.perf_counter()

        async def arrive(moment: float, request: Body) -> None:
            await asyncio.sleep(moment - (time.perf_counter() - began))
            answer = await post(client, url, request)
            if answer.status != 200:
                raise SystemExit(f"a request failed with status {answer.status}")
            seconds[request["num_inference_steps"]].append(answer.seconds)

        await asyncio.gather(*(arrive(moment, request) for moment, request in arrivals))
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BUILT_IN))
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    arguments = parser.parse_args()
    with baseline_server(arguments.model, num_threads=arguments.threads, dtype=arguments.dtype) as server:
        arrivals = schedule(asyncio.run(calibrate(server.url)), arguments.requests)
        baseline = asyncio.run(replay(server.url, arrivals))
    with mezzotint_server(
        arguments.model, num_threads=arguments.threads, endpoint={"dtype": arguments.dtype}
    ) as server:
        ours = asyncio.run(replay(server.url, arrivals))
    ratio = percentile(baseline[SHORT], 95) / percentile(ours[SHORT], 95)
    rows = [("", f"{'first in, first out':>20}{'mezzotint':>12}")]
    for steps in (SHORT, LONG):
        for percent in (50, 95):
            both = (percentile(baseline[steps], percent), percentile(ours[steps], percent))
            rows.append((f"{steps} steps, p{percent}, seconds", f"{both[0]:20.3f}{both[1]:12.3f}"))
    rows.append((f"p95 of {SHORT} steps, times shorter", f"{ratio:32.1f}"))
    report(
        "short_among_long",
        rows,
        {"requests": len(arrivals), "load": LOAD, "p95_ratio": round(ratio, 2)}
        | {"baseline_p95_s": percentile(baseline[SHORT], 95), "mezzotint_p95_s": percentile(ours[SHORT], 95)},
    )
    return int(ratio < 1)


if __name__ == "__main__":
    raise SystemExit(main())
