"""What does the server itself take for a request, with workers that paint instead of computing?

    python -m benchmarks.gateway [--requests N] [--rounds N] [--steps N] [--format url|png] [--auth]

It counts processor seconds, not time, so other programs on the machine change little. The worker and the
clients are counted apart: they have cores of their own where speed matters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from urllib.parse import urlsplit

import psutil

from benchmarks.clients import PATH
from benchmarks.serving import Running, mezzotint_server, report

WARM_REQUESTS = 200
MODEL = "fake:step_s=0,size=16"


async def ask(url: str, key: str, form: str, steps: int, num_requests: int, num_clients: int) -> None:
    """Sends the requests over `num_clients` connections that stay open; each must be answered with 200."""
    numbers = iter(range(num_requests))
    parts = urlsplit(url)

    async def client() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for number in numbers:
            body = {"model": "emoji", "prompt": f"a fox, number {number}", "num_inference_steps": steps}
            text = json.dumps(body | {"seed": number, "response_format": form}).encode()
            head = f"POST {PATH} HTTP/1.1\r\nhost: {parts.netloc}\r\nauthorization: Bearer {key}\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
            writer.write(head.encode() + text)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
            content = await reader.readexactly(length)
            if b" 200 " not in answer.partition(b"\r\n")[0]:
                raise SystemExit(f"a request failed: {content.decode()}")
        writer.close()

    await asyncio.gather(*(client() for _ in range(num_clients)))


def spent_s(process: psutil.Process) -> float:
    """Processor seconds of one process so far, its threads included."""
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(server: Running, key: str, form: str, steps: int, num_requests: int) -> tuple[float, float]:
    """Processor seconds that the server and its worker take for a request."""
    (worker,) = server.workers()
    before = spent_s(server.process), spent_s(worker)
    asyncio.run(ask(server.url, key, form, steps, num_requests, num_clients=16))
    after = spent_s(server.process), spent_s(worker)
    return (after[0] - before[0]) / num_requests, (after[1] - before[1]) / num_requests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--format", choices=("url", "png", "jpeg", "raw"), default="png")
    parser.add_argument("--auth", action="store_true", help="with an API key, as a public server has")
    arguments = parser.parse_args()
    settings = {"auth": arguments.auth, "idempotency_ttl_s": 10}
    with mezzotint_server(MODEL, server=settings) as server:
        key = server.new_key("benchmark")[1] if arguments.auth else ""
        asked = (key, arguments.format, arguments.steps)
        measure(server, *asked, WARM_REQUESTS)
        rounds = [measure(server, *asked, arguments.requests) for _ in range(arguments.rounds)]
    server_s, worker_s = (statistics.median(each) for each in zip(*rounds, strict=True))
    rows = [
        ("server, milliseconds of processor per request", f"{server_s * 1e3:.3f}"),
        ("requests that one core admits and answers per second", f"{1 / server_s:.0f}"),
        ("worker, milliseconds of processor per request", f"{worker_s * 1e3:.3f}"),
    ]
    facts = {"server_s": round(server_s, 6), "worker_s": round(worker_s, 6)}
    report("gateway", rows, facts | {name: getattr(arguments, name) for name in ("steps", "format", "auth")})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
