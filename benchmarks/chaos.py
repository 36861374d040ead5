"""Is anything lost, done twice or changed while everything breaks?

    python -m benchmarks.chaos [--seconds 600] [--model SOURCE] [--threads N] [--adapter ROUTE=SOURCE ...]

A server at load 0.7 with mixed steps (and adapters, where some are named). A worker is killed with SIGKILL
every 20 s, once a worker is stopped with SIGSTOP until the heartbeat finds it, once the disk of the pictures
is full (a tmpfs, which needs root). A tenth of the clients hang up; some give up after 5 s and send the same
body again, as the official client does. Each kind of client has a key of its own, so the database says what
each paid for. Afterwards: every request has exactly one end, nobody paid twice, every picture has the bytes
of a quiet server (the same, started again: keys, adapters and URLs must still hold), and memory is flat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from benchmarks.clients import GIVES_UP_S, Outcome, capacity, leaving, patient, resending
from benchmarks.serving import (
    SIZE,
    Body,
    Running,
    Value,
    body,
    many_connections,
    mezzotint_server,
    report,
)
from mezzotint.load.results import percentile
from mezzotint.server.store.database import database_url, open_database, usage

KINDS = ("patient", "leaving", "resending")
"""The clients, each kind with a key of its own."""
DISK_FULL = "storage_full"
"""The one failure that is documented for what this script breaks."""
LOAD = 0.7
RESENT_LOAD = 0.1
"""The part of the load that the slow requests of resending clients make."""
LEAVERS = 0.1
STEPS, WEIGHTS = (4, 8, 20, 50), (4, 3, 2, 1)
NUM_BODIES = 24
KILL_EVERY_S = 20.0
HEARTBEAT_S = 5.0
DISK = "64m"
SETTINGS: dict[str, Value] = {
    "auth": True,
    "log_level": "info",
    "log_format": "json",
    "heartbeat_s": HEARTBEAT_S,
    "idempotency_ttl_s": 20.0,  # ended requests are forgotten soon, so that memory can be seen to be flat
}
MAX_GROWTH_MIB = 16.0
PROMPTS = ("a red apple", "a happy cat on a teal background", "rocket", "a snail", "pizza")


def some_bodies(routes: Sequence[str]) -> list[Body]:
    """What patient and leaving clients ask for; every third by URL, every second with an adapter."""
    dice = random.Random(77)
    bodies = []
    for number in range(NUM_BODIES):
        steps = dice.choices(STEPS, WEIGHTS)[0]
        one = body(dice.choice(PROMPTS), steps, dice.randrange(2**32), dice.choice((None, 1.0, 5.0)))
        route = routes[number // 2 % len(routes)] if routes and number % 2 else None
        bodies.append(one | ({"model": f"emoji:{route}"} if route else {}))
        if number % 3 == 0:
            bodies[-1]["response_format"] = "url"
    return bodies


# ---------------------------------------------------------------- before: how much is 0.7, and what is slow


async def slow_body(url: str, key: str) -> tuple[Body, float]:
    """A request that takes longer than GIVES_UP_S even alone, where that can be had, and its seconds."""
    slow = body("a slow picture", 50, 1) | {"width": 2 * SIZE, "height": 2 * SIZE}
    async with many_connections(key) as client:
        for num in (1, 2, 4, 8):
            outcome = await patient(client, url, slow | {"n": num})
            if outcome.status != 200:
                raise RuntimeError(f"the slow request failed: {outcome.status} {outcome.code}")
            if outcome.seconds > 1.2 * GIVES_UP_S:
                break
    return slow | {"n": num}, outcome.seconds


# ---------------------------------------------------------------- during: load and faults


class Load:
    """Clients of all kinds, each kind with its own key; requests arrive by chance at given rates."""

    def __init__(self, url: str, keys: Mapping[str, str], bodies: Sequence[Body], slow: Body) -> None:
        self.url, self.bodies, self.slow = url, bodies, slow
        self.clients = {name: many_connections(key) for name, key in keys.items()}
        self.tasks: dict[str, list[asyncio.Task[Outcome]]] = {name: [] for name in KINDS}
        self.dice = random.Random(0)

    def common(self) -> None:
        """One request of the mix: most clients wait for it, some leave."""
        one = self.dice.choice(self.bodies)
        if self.dice.random() >= LEAVERS:
            self._begin("patient", patient(self.clients["patient"], self.url, one))
        else:
            one = one | {"seed": self.dice.randrange(2**32)}
            after_s = self.dice.uniform(0.02, 2.0)
            self._begin("leaving", leaving(self.clients["leaving"], self.url, one, after_s))

    def resent(self) -> None:
        """One slow request of a client that gives up and comes back."""
        one = self.slow | {"seed": self.dice.randrange(2**32)}
        self._begin("resending", resending(self.clients["resending"], self.url, one, self.dice))

    def _begin(self, kind: str, work: Coroutine[Any, Any, Outcome]) -> None:
        self.tasks[kind].append(asyncio.create_task(work))

    async def run(
        self, per_second: float, slow_per_second: float, seconds: float
    ) -> dict[str, list[Outcome]]:
        """What came of all requests that arrived within these seconds."""
        until = time.perf_counter() + seconds

        async def arrivals(begin: Callable[[], None], rate: float) -> None:
            begin()
            while (pause := self.dice.expovariate(rate)) < until - time.perf_counter():
                await asyncio.sleep(pause)
                begin()

        await asyncio.gather(arrivals(self.common, per_second), arrivals(self.resent, slow_per_second))
        outcomes = {kind: list(await asyncio.gather(*tasks)) for kind, tasks in self.tasks.items()}
        for client in self.clients.values():
            await client.aclose()
        return outcomes


@dataclass(slots=True)
class Faults:
    """What was done to the server, and how its memory went meanwhile."""

    killed: int = 0
    hang_noticed_s: float | None = None
    disk: str = "skipped: a tmpfs needs root"
    memory: list[int] = field(default_factory=list)


async def disturb(server: Running, images: Path | None, seconds: float, faults: Faults) -> None:
    """Kills workers, stops one, fills the disk `images` (None: there is none to fill), each at its time."""
    every = min(KILL_EVERY_S, seconds / 5)
    plan: list[tuple[float, Callable[[], Coroutine[Any, Any, None]]]] = [
        (every * number, lambda: kill(server, faults)) for number in range(1, int(seconds / every))
    ]
    plan.append((seconds * 0.45, lambda: hang(server, faults)))
    if images is not None:
        plan.append((seconds * 0.7, lambda: fill(images, min(10.0, seconds / 10), faults)))
    began = time.perf_counter()
    for when, fault in sorted(plan, key=lambda item: item[0]):
        await asyncio.sleep(when - (time.perf_counter() - began))
        await fault()


async def kill(server: Running, faults: Faults) -> None:
    for worker in server.workers():
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
            faults.killed += 1


async def hang(server: Running, faults: Faults) -> None:
    """Stops a worker for good; the server's heartbeat must find it."""
    while not (await asyncio.to_thread(server.is_ready) and server.workers()):  # one was just killed
        await asyncio.sleep(0.1)
    worker, began = server.workers()[0], time.perf_counter()
    worker.suspend()
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        if time.perf_counter() - began > 10 * HEARTBEAT_S:
            worker.kill()
            return
        await asyncio.sleep(0.1)
    faults.hang_noticed_s = time.perf_counter() - began


async def fill(images: Path, seconds: float, faults: Faults) -> None:
    filler = images / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    await asyncio.sleep(seconds)
    filler.unlink()
    faults.disk = f"full for {seconds:.0f} s"


async def watch(server: Running, faults: Faults) -> None:
    while True:
        faults.memory.append(server.process.memory_info().rss)
        await asyncio.sleep(1.0)


async def settled(url: str, key: str) -> None:
    """Waits until the server has nothing in hand: attach windows are closed, and all is over."""
    async with many_connections(key) as client:
        for _ in range(600):
            text = (await client.get(f"{url}/metrics")).text
            if all(f'mezzotint_{name}_jobs{{endpoint="emoji"}} 0.0' in text for name in ("queue", "running")):
                return
            await asyncio.sleep(0.1)
    raise RuntimeError("a minute after the last answer the server still has jobs in hand")


# ---------------------------------------------------------------- afterwards


def ends(log: Path) -> dict[str, list[str]]:
    """How each request ended, by the server's log; exactly one word each if all is well."""
    found: dict[str, list[str]] = {}
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry.get("event") == "request ended":
                found.setdefault(entry["ticket"], []).append(entry["status"])
            elif entry.get("event", "").startswith("client vanished"):
                found.setdefault(entry["ticket"], [])
    return found


def paid(data_dir: Path) -> Counter[str]:
    """Images that each key was charged for."""
    engine = open_database(database_url(data_dir, None))
    try:
        with engine.connect() as connection:
            rows = connection.execute(sa.select(usage.c.key_id, usage.c.images))
            return Counter({str(key): int(images) for key, images in rows})
    finally:
        engine.dispose()


def num_images(outcomes: Sequence[Outcome]) -> int:
    return sum(outcome.body.get("n", 1) for outcome in outcomes)


def account(
    outcomes: Mapping[str, list[Outcome]], ended: Mapping[str, list[str]], charged: Mapping[str, int]
) -> dict[str, int]:
    """What must be zero."""
    everything = [outcome for of_kind in outcomes.values() for outcome in of_kind]
    waited = [outcome for outcome in everything if not outcome.left]
    answered = [outcome for outcome in waited if outcome.status == 200]
    tickets = Counter(outcome.ticket for outcome in answered)
    made = {
        kind: num_images([outcome for outcome in of_kind if outcome.status == 200])
        for kind, of_kind in outcomes.items()
    }
    left = num_images([outcome for outcome in everything if outcome.left])
    return {
        "requests without an answer": sum(outcome.status == 0 for outcome in waited),
        "answers that no fault explains": sum(
            outcome.status not in (0, 200) and outcome.code != DISK_FULL for outcome in waited
        ),
        "requests that ended never or twice": sum(len(words) != 1 for words in ended.values()),
        "answers whose request did not end as done": sum(ended.get(one) != ["done"] for one in tickets),
        "answers shared by two requests": sum(number - 1 for number in tickets.values()),
        "images paid too often or not at all": abs(charged["patient"] - made["patient"])
        + abs(charged["resending"] - made["resending"])
        + max(0, charged["leaving"] - made["leaving"] - left),
    }


async def changed(url: str, key: str, answered: Sequence[Outcome]) -> tuple[int, int]:
    """Requests that have other bytes when alone on a quiet server, and how many different ones there were."""
    alone: dict[str, list[bytes]] = {}
    different = 0
    async with many_connections(key) as client:
        for outcome in answered:
            name = json.dumps(outcome.body, sort_keys=True)
            if name not in alone:
                alone[name] = (await patient(client, url, outcome.body)).pictures
            different += outcome.pictures != alone[name] or not outcome.pictures or b"" in outcome.pictures
    return different, len(alone)


async def dead_urls(url: str, answered: Sequence[Outcome]) -> int:
    """How many URLs of the run, unexpired, the restarted server no longer answers with the same picture."""
    dead = 0
    async with many_connections() as client:
        for outcome in (one for one in answered if one.urls):  # base64 has none
            for old, picture in zip(outcome.urls, outcome.pictures, strict=True):
                path = old.partition("://")[2].partition("/")[2]
                answer = await client.get(f"{url}/{path}")
                dead += answer.status_code != 200 or answer.content != picture
    return dead


def growth_mib(memory: Sequence[int]) -> float:
    """From the second quarter of the run to the last."""
    quarter = max(1, len(memory) // 4)
    return (statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter])) / 2**20


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A tmpfs at `folder`; None, and an ordinary folder, where it cannot be mounted."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True
    )
    try:
        yield None if mounted.returncode else folder
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", folder], check=True)


async def chaos(
    server: Running, keys: Mapping[str, str], images: Path | None, bodies: Sequence[Body], seconds: float
) -> tuple[dict[str, list[Outcome]], Faults, dict[str, float]]:
    """Measures on the quiet server what its capacity is, then breaks things under load."""
    rate = await capacity(server.url, keys["measuring"], bodies, min(20.0, seconds / 4))
    slow, slow_s = await slow_body(server.url, keys["measuring"])
    faults = Faults()
    watching = asyncio.create_task(watch(server, faults))
    load = Load(server.url, {kind: keys[kind] for kind in KINDS}, bodies, slow)
    disturbing = asyncio.create_task(disturb(server, images, seconds, faults))
    outcomes = await load.run((LOAD - RESENT_LOAD) * rate, RESENT_LOAD / slow_s, seconds)
    await disturbing
    await settled(server.url, keys["measuring"])
    watching.cancel()
    return outcomes, faults, {"capacity_per_s": rate, "slow_s": slow_s}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--model", default="emoji", help="fake:step_s=0.12,size=128 needs no model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--adapter", action="append", default=[], metavar="ROUTE=SOURCE")
    arguments = parser.parse_args()
    adapters = dict(text.split("=", 1) for text in arguments.adapter)
    bodies = some_bodies(list(adapters))
    with tempfile.TemporaryDirectory(prefix="mezzotint-chaos-") as name:
        data_dir, log = Path(name) / "data", Path(name) / "server.log"

        def started() -> contextlib.AbstractContextManager[Running]:
            return mezzotint_server(
                arguments.model,
                num_threads=arguments.threads,
                adapters=adapters,
                server=SETTINGS,
                data_dir=data_dir,
                log=log,
            )

        with small_disk(data_dir / "images") as images:
            with started() as server:
                made = {
                    kind: server.new_key(kind, admin=kind == "measuring") for kind in (*KINDS, "measuring")
                }
                secrets = {kind: secret for kind, (_, secret) in made.items()}
                outcomes, faults, facts = asyncio.run(
                    chaos(server, secrets, images, bodies, arguments.seconds)
                )
                server.stop()
            charged, ended = paid(data_dir), ends(log)
            answered = [one for of_kind in outcomes.values() for one in of_kind if one.status == 200]
            with started() as server:
                dead = asyncio.run(dead_urls(server.url, answered))
                different, num_distinct = asyncio.run(changed(server.url, secrets["measuring"], answered))
    wrong = account(outcomes, ended, {kind: charged[made[kind][0]] for kind in KINDS})
    wrong["requests with other bytes than on a quiet server"] = different
    wrong["URLs that did not outlive a restart of the server"] = dead
    grown = growth_mib(faults.memory)
    show(outcomes, ended, faults, wrong, {**facts, "distinct": num_distinct, "growth_mib": round(grown, 1)})
    return int(any(wrong.values()) or grown > MAX_GROWTH_MIB)


def show(
    outcomes: Mapping[str, list[Outcome]],
    ended: Mapping[str, list[str]],
    faults: Faults,
    wrong: Mapping[str, int],
    facts: Mapping[str, float],
) -> None:
    everything = [outcome for of_kind in outcomes.values() for outcome in of_kind]
    seconds = [outcome.seconds for outcome in outcomes["patient"] if outcome.status == 200]
    codes = Counter(outcome.code for outcome in everything if outcome.code)
    words = Counter(words[0] for words in ended.values() if words)
    hang = "not noticed" if faults.hang_noticed_s is None else f"noticed after {faults.hang_noticed_s:.1f} s"
    counts = {
        "requests": len(everything),
        "of these hung up for good": sum(outcome.left for outcome in everything),
        "of these sent more than once": sum(outcome.attempts > 1 for outcome in everything),
        "answered": sum(outcome.status == 200 for outcome in everything),
        **{f"answered with {code}": number for code, number in sorted(codes.items())},
        **{f"ended as {word}": number for word, number in sorted(words.items())},
        "workers killed": faults.killed,
    }
    rows = [(label, str(number)) for label, number in counts.items()]
    rows += [("hang", hang), ("disk", faults.disk)]
    rows += [
        (f"patient clients' p{percent}, s", f"{percentile(seconds, percent):.2f}") for percent in (50, 99)
    ]
    rows += [(name.replace("_", " "), f"{value:.2f}") for name, value in facts.items()]
    rows += [("must be 0: " + label, str(number)) for label, number in wrong.items()]
    report("chaos", rows, {**counts, **facts, "disk": faults.disk, "hang": hang, "wrong": dict(wrong)})


if __name__ == "__main__":
    raise SystemExit(main())
