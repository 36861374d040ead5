"""Does anything grow, leak or get lost while everything is used at once for long?

    python -m benchmarks.soak [--seconds 3600] [--model SOURCE] [--threads N] [--clients N]

All dialects, edits, streams, asynchronous requests and their watchers, adapters that come and go, updates,
restarts, sleep, wrong keys, clients that hang up and workers that are killed. The same request must have the
same bytes each time. Afterwards: every request has ended exactly once, every answer was one that is
documented, memory is within 5 % of what it was in the second quarter, descriptors and threads are as many.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import io
import itertools
import json
import random
import statistics
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from PIL import Image

from benchmarks.chaos import ends, settled
from benchmarks.serving import SIZE, Running, Value, many_connections, mezzotint_server, report

GENERATE, EDIT = "/dedicated/v1/images/generations", "/dedicated/v1/images/edits"
BASE = "/dedicated/beta/endpoint/emoji"
PROMPTS = ("a red apple", "a snail", "rocket", "pizza", "an owl")
STEPS = (1, 2, 4, 8)
NUM_SEEDS = 6
"""Few, so that the same requests come again and again."""
KILL_EVERY_S, CHANGE_EVERY_S = 10.0, 7.0
MAX_GROWTH = 0.05
MAX_MORE = 8
"""How many more descriptors or threads there may be at the end: those of one worker more or less."""
JUDGED_S = 300.0
"""In a shorter run memory has not settled, and its growth is told but not judged."""
ACCEPTED = (200, 202, 204)
EXPECTED = {
    "queue_full", "endpoint_starting", "adapter_not_found", "conflict", "too_many_answers",
    "adapter_load_failed",
}  # fmt: skip
"""Refusals that what this program does explains."""
SETTINGS: dict[str, Value] = {
    "auth": True,
    "log_level": "info",
    "log_format": "json",
    "idempotency_ttl_s": 20.0,
    "url_ttl_s": 30.0,
    "gallery_size": 20,
    "attach_window_s": 1.0,
}


@dataclass(slots=True)
class Found:
    """What came of it all."""

    answers: Counter[str] = field(default_factory=Counter)
    """By what was asked."""
    unexplained: Counter[str] = field(default_factory=Counter)
    pictures: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the pixels, by the request."""
    changed: int = 0
    """Requests that had other pixels the second time."""
    killed: int = 0
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


class Client:
    """One user of everything."""

    def __init__(self, url: str, key: str, found: Found, seed: int) -> None:
        self.url, self.found, self.dice = url, found, random.Random(seed)
        self.http = many_connections(key)
        self.http.timeout = httpx2.Timeout(120.0)

    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.dice.choice(PROMPTS),
            "num_inference_steps": self.dice.choice(STEPS),
            "seed": self.dice.randrange(NUM_SEEDS),
        }

    def check(self, what: str, answer: httpx2.Response) -> bool:
        """Whether the answer is the one that was asked for; counts it either way."""
        self.found.answers[what] += 1
        if answer.status_code in ACCEPTED:
            return True
        code = answer.json()["error"]["code"] if answer.content else "none"
        if code not in EXPECTED:
            self.found.unexplained[f"{what}: {answer.status_code} {code}"] += 1
        return False

    def compare(self, body: dict[str, Any], file: bytes) -> None:
        pixels = Image.open(io.BytesIO(file)).convert("RGB").tobytes()
        name, digest = json.dumps(body, sort_keys=True), hashlib.sha256(pixels).hexdigest()
        self.found.changed += self.found.pictures.setdefault(name, digest) != digest

    # ------------------------------------------------------------ what it does

    async def dedicated(self) -> None:
        body = self.body() | {"model": "emoji", "width": SIZE, "height": SIZE}
        form = self.dice.choice(("png", "url"))
        answer = await self.http.post(self.url + GENERATE, json=body | {"response_format": form})
        if self.check("dedicated", answer):
            item = answer.json()["data"][0]
            picture = await self.http.get(item["url"]) if form == "url" else None
            self.compare(body, picture.content if picture else base64.b64decode(item["b64_json"]))

    async def asynchronous(self) -> None:
        body = self.body() | {"model": "emoji", "response_format": "png"}
        headers = {"prefer": "respond-async, previews=2", "idempotency-key": str(self.dice.random())}
        answer = await self.http.post(self.url + GENERATE, json=body, headers=headers)
        if self.check("asynchronous", answer):
            path = f"{self.url}/dedicated/v1/requests/{answer.json()['id']}"
            events = await self.http.get(f"{path}/events")
            self.check("events", events)
            self.check("state", await self.http.get(path))

    async def openai(self) -> None:
        body = self.body() | {"model": "emoji", "response_format": "b64_json"}
        answer = await self.http.post(f"{self.url}/v1/images/generations", json=body)
        if self.check("openai", answer):
            self.compare(body, base64.b64decode(answer.json()["data"][0]["b64_json"]))

    async def stream(self) -> None:
        body = self.body() | {"model": "emoji", "stream": True, "partial_images": 2}
        self.check("stream", await self.http.post(f"{self.url}/v1/images/generations", json=body))

    async def a1111(self) -> None:
        body = self.body()
        fields = {"prompt": body["prompt"], "steps": body["num_inference_steps"], "seed": body["seed"]}
        answer = await self.http.post(f"{self.url}/sdapi/v1/txt2img", json=fields)
        if self.check("a1111", answer):
            file = answer.json()["images"][0]
            self.compare({"a1111": fields}, base64.b64decode(file))
            self.check(
                "png-info", await self.http.post(f"{self.url}/sdapi/v1/png-info", json={"image": file})
            )

    async def edit(self) -> None:
        drawn = io.BytesIO()
        Image.new("RGB", (SIZE, SIZE), (self.dice.randrange(4) * 60, 90, 30)).save(drawn, format="PNG")
        picture = {"image": base64.b64encode(drawn.getvalue()).decode()}
        body = self.body() | {"model": "emoji", "image": picture, "strength": 1.0, "response_format": "png"}
        answer = await self.http.post(self.url + EDIT, json=body)
        if self.check("edit", answer):
            self.compare(body, base64.b64decode(answer.json()["data"][0]["b64_json"]))

    async def adapted(self) -> None:
        body = self.body() | {"model": "emoji:come-and-go", "response_format": "png"}
        self.check("adapter", await self.http.post(self.url + GENERATE, json=body))

    async def leaving(self) -> None:
        body = self.body() | {"model": "emoji", "seed": self.dice.randrange(2**31)}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.dice.uniform(0.0, 0.1)):
                await self.http.post(self.url + GENERATE, json=body)
        self.found.answers["left"] += 1

    async def looking(self) -> None:
        for path in ("/v1/models", "/dedicated/v1/images?limit=5", "/healthz"):
            self.check("looking", await self.http.get(self.url + path))

    async def wrong(self) -> None:
        headers = {"authorization": f"Bearer mz_{self.dice.random()}"}
        answer = await self.http.post(self.url + GENERATE, json=self.body(), headers=headers)
        self.found.answers["wrong key"] += 1
        if answer.status_code not in (401, 503):
            self.found.unexplained[f"wrong key: {answer.status_code}"] += 1

    async def run(self, until: float) -> None:
        acts: Sequence[Callable[[], Awaitable[None]]] = (
            self.dedicated, self.asynchronous, self.openai, self.stream, self.a1111, self.edit, self.adapted,
            self.leaving, self.looking, self.wrong,
        )  # fmt: skip
        while time.monotonic() < until:
            try:
                await self.dice.choice(acts)()
            except httpx2.HTTPError as error:
                self.found.unexplained[type(error).__name__] += 1
        await self.http.aclose()


# ---------------------------------------------------------------- what is done to the server


def write_adapter(file: Path, value: float) -> Path:
    """A safetensors file with the two matrices of one layer, as large as any."""
    data = np.full(32, value, np.float32).tobytes()
    entry = {"dtype": "F32", "shape": [4, 4]}
    header = {
        "transformer.x.lora_A.weight": entry | {"data_offsets": [0, 64]},
        "transformer.x.lora_B.weight": entry | {"data_offsets": [64, 128]},
    }
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


async def change(url: str, key: str, files: Sequence[Path], found: Found, until: float) -> None:
    """Adapters come and go; updates, restarts, sleep and waking follow each other."""
    client, number = Client(url, key, found, 0), 0
    while time.monotonic() < until:
        number += 1
        added = {"route": "come-and-go", "source": str(files[number % len(files)]), "replace": True}
        settings = {"settings": {"default_steps": number % 5 + 1}}
        for method, path, body in (
            ("POST", "/adapters", added),
            ("PUT", "", settings),
            ("PUT", ("/restart", "/sleep", "/wake")[number % 3], None),
            ("DELETE", "/adapters/come-and-go", None),
        ):
            await asyncio.sleep(min(CHANGE_EVERY_S, max(0.0, until - time.monotonic())) / 4)
            client.check("change", await client.http.request(method, url + BASE + path, json=body))
    await client.http.aclose()


async def kill(server: Running, found: Found, until: float) -> None:
    while (left := until - time.monotonic()) > KILL_EVERY_S / 10:
        await asyncio.sleep(min(KILL_EVERY_S, left / 2))
        for worker in server.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
                found.killed += 1


async def watch(server: Running, found: Found) -> None:
    while True:
        with server.process.oneshot():
            found.memory.append(server.process.memory_info().rss)
            found.threads.append(server.process.num_threads())
            found.descriptors.append(server.process.num_fds())
        await asyncio.sleep(1.0)


async def soak(server: Running, files: Sequence[Path], seconds: float, num_clients: int) -> Found:
    """Uses and disturbs the server for that long, then waits until it has nothing in hand."""
    found, until = Found(), time.monotonic() + seconds
    _, admin = server.new_key("admin", admin=True)
    users = [server.new_key(f"user-{number}")[1] for number in range(num_clients)]
    watching = asyncio.create_task(watch(server, found))
    await asyncio.gather(
        *(Client(server.url, key, found, number).run(until) for number, key in enumerate(users, 1)),
        change(server.url, admin, files, found, until),
        kill(server, found, until),
    )
    async with many_connections(admin) as client:
        await client.put(f"{server.url}{BASE}/wake")
    await settled(server.url, admin)
    watching.cancel()
    return found


# ---------------------------------------------------------------- what came of it


def growth(values: Sequence[int]) -> tuple[float, float]:
    """The medians of the second quarter and of the last."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])


def by_tenth(values: Sequence[int]) -> list[float]:
    """The median MiB of each tenth of the time, which show whether memory levels off."""
    bounds = [len(values) * number // 10 for number in range(11)]
    tenths = (values[begin:end] for begin, end in itertools.pairwise(bounds))
    return [round(statistics.median(tenth) / 2**20, 1) for tenth in tenths if tenth]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--model", default="fake:step_s=0.01,size=128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mezzotint-soak-") as name:
        folder = Path(name)
        log = folder / "log"
        files = [write_adapter(folder / f"{number}.safetensors", number) for number in range(3)]
        with mezzotint_server(
            arguments.model, num_threads=arguments.threads, server=SETTINGS, data_dir=folder / "data", log=log
        ) as server:
            found = asyncio.run(soak(server, files, arguments.seconds, arguments.clients))
            server.stop()
        ended = ends(log)
    memory, threads, descriptors = (
        growth(values) for values in (found.memory, found.threads, found.descriptors)
    )
    judged = arguments.seconds >= JUDGED_S
    wrong = {
        "requests that ended never or twice": sum(len(words) != 1 for words in ended.values()),
        "answers that nothing explains": sum(found.unexplained.values()),
        "requests with other pixels the second time": found.changed,
        "memory grew": int(judged and memory[1] > memory[0] * (1 + MAX_GROWTH)),
        "descriptors grew": int(judged and descriptors[1] > descriptors[0] + MAX_MORE),
        "threads grew": int(judged and threads[1] > threads[0] + MAX_MORE),
    }
    facts: dict[str, Any] = {
        "seconds": arguments.seconds,
        "requests": len(ended),
        "answers": dict(found.answers),
        "unexplained": dict(found.unexplained),
        "killed": found.killed,
        "memory_mib": [round(value / 2**20, 1) for value in memory],
        "memory_by_tenth_mib": by_tenth(found.memory),
        "threads": threads,
        "descriptors": descriptors,
        "wrong": wrong,
    }
    report("soak", [(name, str(value)) for name, value in facts.items()], facts)
    return int(any(wrong.values()))


if __name__ == "__main__":
    raise SystemExit(main())
