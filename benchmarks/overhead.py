"""What does HTTP and scheduling cost a lone request?

    python -m benchmarks.overhead [--model SOURCE] [--threads N] [--dtype bf16|fp32] [--steps N]

Twenty requests over HTTP and twenty plain diffusers calls in this process take turns, same threads and dtype.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time

import torch

from benchmarks.baseline_server import load, text_length
from benchmarks.serving import BUILT_IN, SIZE, body, many_connections, mezzotint_server, post, report

WARM_ROUNDS = 2


async def measure(
    url: str, model: str, dtype: str, steps: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds over HTTP and in process, turn by turn."""
    pipeline = load(model, dtype)
    served, plain = [], []
    async with many_connections() as client:
        for seed in range(WARM_ROUNDS + rounds):
            answer = await post(client, url, body("a happy cat", steps, seed))
            if answer.status != 200:
                raise SystemExit(f"a request failed with status {answer.status}")
            served.append(answer.seconds)
            began = time.perf_counter()
            pipeline(
                "a happy cat",
                num_inference_steps=steps,
                width=SIZE,
                height=SIZE,
                **text_length(pipeline),
                generator=torch.Generator().manual_seed(seed),
            )
            plain.append(time.perf_counter() - began)
    return served[WARM_ROUNDS:], plain[WARM_ROUNDS:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BUILT_IN))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with mezzotint_server(
        arguments.model, num_threads=arguments.threads, endpoint={"dtype": arguments.dtype}
    ) as server:
        served, plain = asyncio.run(
            measure(server.url, arguments.model, arguments.dtype, arguments.steps, arguments.rounds)
        )
    over_http, in_process = statistics.median(served) * 1e3, statistics.median(plain) * 1e3
    percent = (over_http / in_process - 1) * 100
    rows = [
        ("over HTTP, ms", f"{over_http:.1f}"),
        ("plain diffusers in process, ms", f"{in_process:.1f}"),
        ("longer by", f"{percent:.1f} %"),
    ]
    report(
        "overhead",
        rows,
        {"steps": arguments.steps, "http_ms": round(over_http, 2), "plain_ms": round(in_process, 2)}
        | {"percent": round(percent, 1)},
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
