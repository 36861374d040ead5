"""How soon is the first answer, and what does a killed worker lose?

    python -m benchmarks.first_answer [--model SOURCE] [--threads N]

Seconds from the command `mezzotint serve` to the first picture. Then 20 requests at once, the worker killed
with SIGKILL while they run; each must be answered, with the bytes it has alone.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from benchmarks.serving import Answer, Running, body, many_connections, mezzotint_server, post, report

REQUESTS = [body("a happy cat", 20, seed) for seed in range(20)]


async def survive(server: Running) -> tuple[list[Answer], list[Answer]]:
    """The answers while the worker is killed, and each alone afterwards."""
    async with many_connections() as client:
        waiting = [asyncio.create_task(post(client, server.url, request)) for request in REQUESTS]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)  # so the others are under way
        for worker in server.workers():
            worker.kill()
        killed = await asyncio.gather(*waiting)
        return killed, [await post(client, server.url, request) for request in REQUESTS]


async def first(server: Running) -> float:
    async with many_connections() as client:
        began = time.perf_counter()
        answer = await post(client, server.url, body("a red apple", 8, 7))
        if answer.status != 200:
            raise SystemExit(f"the first request failed with status {answer.status}")
        return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with mezzotint_server(arguments.model, num_threads=arguments.threads) as server:
        first_s = server.started_s + asyncio.run(first(server))
        killed, alone = asyncio.run(survive(server))
    lost = sum(answer.status != 200 for answer in killed)
    changed = sum(one.picture != other.picture for one, other in zip(killed, alone, strict=True))
    rows = [
        ("command to ready, s", f"{server.started_s:.1f}"),
        ("command to first picture, s", f"{first_s:.1f}"),
        ("requests while the worker was killed", str(len(REQUESTS))),
        ("of those lost", str(lost)),
        ("of those with other bytes", str(changed)),
    ]
    report(
        "first_answer",
        rows,
        {
            "ready_s": round(server.started_s, 2),
            "first_answer_s": round(first_s, 2),
            "lost": lost,
            "changed": changed,
        },
    )
    return int(lost > 0 or changed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
