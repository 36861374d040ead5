"""What do workers on Ray cost beside workers of this machine?

    python -m benchmarks.carriers [--rounds N] [--replicas 1,2,4,8] [--seconds S] [--nodes N]

It starts a Ray cluster of its own on this machine. Workers sleep instead of computing, and both carriers
take turns. It measures times: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.serving import Value, body, many_connections, mezzotint_server, post, report
from mezzotint.config import Settings
from mezzotint.messages import (
    Cancel,
    Cancelled,
    FromWorker,
    Generate,
    LoadModel,
    Message,
    Ping,
    Pong,
    Progress,
    Ready,
)
from mezzotint.server.workers.process import WorkerProcess, WorkerSettings
from mezzotint.spec import ImageSpec

FAKE = "mezzotint.fake_worker:run"
STEPS, STEP_S = 8, 0.05
WARM_ROUNDS = 3
STORE_BYTES = 80 * 2**20
Carriers = dict[str, str | None]
"""By name, the address of Ray; None is this machine."""


@contextlib.contextmanager
def cluster(num_nodes: int) -> Iterator[str]:
    """The address of a head without room for workers, and of nodes with room for all."""
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        raise SystemExit("this benchmark needs Ray; pip install 'mezzotint[server,ray]'") from None
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    running = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(num_nodes):
            running.add_node(num_cpus=16, object_store_memory=STORE_BYTES)
        yield str(running.address)
    finally:
        running.shutdown()


class Line:
    """One worker behind its carrier, without the rest of the server."""

    def __init__(self, process: WorkerProcess) -> None:
        self._process = process
        self._heard: asyncio.Queue[FromWorker] = asyncio.Queue()
        process.listen(self._heard.put_nowait, lambda code: None)

    async def answer(self, message: Message, kind: type[FromWorker]) -> float:
        """Sends a message; seconds until the first answer of this kind."""
        began = time.perf_counter()
        self._process.send(message)
        while not isinstance(await self._heard.get(), kind):
            pass
        return time.perf_counter() - began

    def close(self) -> None:
        self._process.kill()


async def delays(carriers: Carriers, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by carrier: a Ping's way there and back, and a running job's Cancel."""
    lines: dict[str, Line] = {}
    for name, ray in carriers.items():
        settings = WorkerSettings.of(Settings(ray=ray), FAKE)
        lines[name] = Line(await settings.carrier.start())
        await lines[name].answer(LoadModel("one", f"fake:step_s={STEP_S}"), Ready)
    found: dict[str, dict[str, list[float]]] = {name: {"ping": [], "cancel": []} for name in lines}
    spec = ImageSpec(prompt="a fox", num_inference_steps=100_000, seed=1)
    for number in range(WARM_ROUNDS + rounds):
        for name, line in lines.items():
            found[name]["ping"].append(await line.answer(Ping(number), Pong))
            job = f"job-{number}"
            await line.answer(Generate(job, spec), Progress)
            found[name]["cancel"].append(await line.answer(Cancel(job), Cancelled))
    for line in lines.values():
        line.close()
    return {
        name: {what: 1e3 * statistics.median(each[WARM_ROUNDS:]) for what, each in times.items()}
        for name, times in found.items()
    }


def server_settings(ray: str | None) -> Mapping[str, Value]:
    return {"idempotency_ttl_s": 10} | ({} if ray is None else {"ray": ray})


async def lone(urls: dict[str, str], rounds: int) -> dict[str, float]:
    """Median milliseconds of a lone request by carrier, turn by turn."""
    found: dict[str, list[float]] = {name: [] for name in urls}
    async with many_connections() as client:
        for seed in range(WARM_ROUNDS + rounds):
            for name, url in urls.items():
                found[name].append(await _asked(client, url, seed))
    return {name: 1e3 * statistics.median(each[WARM_ROUNDS:]) for name, each in found.items()}


async def throughput(url: str, num_clients: int, seconds: float) -> float:
    """Requests a second while `num_clients` ask without a pause."""
    seeds, until, done = iter(range(10**9)), time.perf_counter() + seconds, 0

    async def client(http: Any) -> None:
        nonlocal done
        while time.perf_counter() < until:
            await _asked(http, url, next(seeds))
            done += 1

    async with many_connections() as http:
        began = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(num_clients)))
        return done / (time.perf_counter() - began)


async def _asked(client: Any, url: str, seed: int) -> float:
    answer = await post(client, url, body("a fox", STEPS, seed))
    if answer.status != 200:
        raise SystemExit(f"a request failed with status {answer.status}")
    return answer.seconds


def lone_by_carrier(carriers: Carriers, rounds: int) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        urls = {
            name: stack.enter_context(
                mezzotint_server("fake:step_s=0.01,size=128", server=server_settings(ray))
            ).url
            for name, ray in carriers.items()
        }
        return asyncio.run(lone(urls, rounds))


def rates_by_replicas(ray: str | None, counts: list[int], seconds: float) -> dict[int, float]:
    """Requests a second with so many workers, of which each does one job at a time."""
    rates = {}
    for num in counts:
        endpoint: dict[str, Value] = {"replicas": num, "max_jobs": 1}
        with mezzotint_server(
            f"fake:step_s={STEP_S},size=128", endpoint=endpoint, server=server_settings(ray)
        ) as server:
            rates[num] = asyncio.run(throughput(server.url, 3 * num, seconds))
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="of lone requests, pings and cancels")
    parser.add_argument("--replicas", default="1,2,4,8", help="numbers of workers to try")
    parser.add_argument("--seconds", type=float, default=20, help="for each number of workers")
    parser.add_argument("--nodes", type=int, default=2)
    arguments = parser.parse_args()
    counts = [int(text) for text in arguments.replicas.split(",")]
    rows, facts = [], {}
    with cluster(arguments.nodes) as address:
        carriers: Carriers = {"local": None, "ray": address}
        medians = lone_by_carrier(carriers, arguments.rounds)
        waits = asyncio.run(delays(carriers, arguments.rounds))
        rates = {name: rates_by_replicas(ray, counts, arguments.seconds) for name, ray in carriers.items()}
    for name in carriers:
        linear = {num: rate * STEPS * STEP_S / num for num, rate in rates[name].items()}
        rows += [
            (f"{name}: a lone request of {STEPS} steps, ms", f"{medians[name]:.1f}"),
            (f"{name}: a message to a worker and its answer, ms", f"{waits[name]['ping']:.1f}"),
            (f"{name}: a cancel, in steps of {1e3 * STEP_S:g} ms, ms", f"{waits[name]['cancel']:.1f}"),
            (
                f"{name}: share of what {arguments.replicas} sleeping workers could do",
                ", ".join(f"{share:.2f}" for share in linear.values()),
            ),
        ]
        facts[name] = {"lone_ms": medians[name], **waits[name], "share": linear}
    report("carriers", rows, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
