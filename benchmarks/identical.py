"""Does the same request give the same bytes among 64 others?

    python -m benchmarks.identical [--model SOURCE] [--threads N]

64 requests with mixed steps, guidance, seeds and prompts at once, then each alone on the same server.
Every PNG must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

from benchmarks.serving import Answer, Body, body, many_connections, mezzotint_server, post, report

NUM_REQUESTS = 64
STEPS = (4, 8, 20, 50)
GUIDANCE = (None, 1.0, 3.5, 7.0)
PROMPTS = (
    "a red apple",
    "a happy cat on a teal background",
    "rocket",
    "a snail on a yellow background",
    "pizza",
)


def mixed_requests() -> list[Body]:
    """Always the same 64."""
    dice = random.Random(64)
    return [
        body(dice.choice(PROMPTS), STEPS[number % len(STEPS)], dice.randrange(2**32), dice.choice(GUIDANCE))
        for number in range(NUM_REQUESTS)
    ]


async def measure(url: str, requests: list[Body]) -> tuple[list[Answer], list[Answer], float, float]:
    """Answers together and alone, and how long each way took."""
    async with many_connections() as client:
        began = time.perf_counter()
        together = await asyncio.gather(*(post(client, url, request) for request in requests))
        together_s = time.perf_counter() - began
        began = time.perf_counter()
        alone = [await post(client, url, request) for request in requests]
        return together, alone, together_s, time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    requests = mixed_requests()
    with mezzotint_server(arguments.model, num_threads=arguments.threads) as server:
        together, alone, together_s, alone_s = asyncio.run(measure(server.url, requests))
    failures = sum(answer.status != 200 for answer in (*together, *alone))
    different = sum(one.picture != other.picture for one, other in zip(together, alone, strict=True))
    distinct = len({answer.picture for answer in alone})
    rows = [
        ("requests", f"{len(requests)} together, then each alone"),
        ("failures", str(failures)),
        ("different bytes", str(different)),
        ("distinct pictures", str(distinct)),
        ("seconds together", f"{together_s:.1f}"),
        ("seconds one by one", f"{alone_s:.1f}"),
    ]
    report(
        "identical",
        rows,
        {"requests": len(requests), "failures": failures, "different": different, "distinct": distinct}
        | {"together_s": round(together_s, 2), "alone_s": round(alone_s, 2)},
    )
    return int(failures > 0 or different > 0 or distinct < len(requests))


if __name__ == "__main__":
    raise SystemExit(main())
