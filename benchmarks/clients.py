"""Clients as there are in the world: patient ones, some that hang up, some that give up and come back."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2

from benchmarks.serving import REQUEST_TIMEOUT_S, Body, many_connections

PATH = "/dedicated/v1/images/generations"
GIVES_UP_S = 5.0
"""The official client's default; then it sends the same body again, after a growing pause."""
FIRST_PAUSE_S, PAUSE_FACTOR, LONGEST_PAUSE_S = 0.5, 1.5, 60.0
COMES_BACK_FOR_S = 3600.0


@dataclass(slots=True)
class Outcome:
    """What one request of one client came to, however often it was sent."""

    body: Body
    status: int = 0
    """Of the last answer; 0: none."""
    code: str = ""
    ticket: str = ""
    """The id that the server's log has for it."""
    pictures: list[bytes] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    attempts: int = 0
    seconds: float = 0.0
    """From the first attempt to the last answer."""
    last_s: float = 0.0
    """Of the last attempt alone."""
    queue_s: float = 0.0
    retry_after_s: float = 0.0
    left: bool = False

    def read(self, response: httpx2.Response) -> None:
        values = response.json()
        self.status, self.retry_after_s = response.status_code, float(response.headers.get("retry-after", 0))
        if response.status_code != 200:
            self.code, self.ticket = values["error"]["code"], values["request_id"]
            return
        self.code, self.ticket = "", values["id"]
        self.queue_s = max(item["timings"]["queue_ms"] for item in values["data"]) / 1000
        self.pictures = [base64.b64decode(item["b64_json"]) for item in values["data"] if "b64_json" in item]
        self.urls = [item["url"] for item in values["data"] if "url" in item]

    async def fetch(self, client: httpx2.AsyncClient) -> None:
        """The pictures that the answer had only the URLs of."""
        for url in self.urls:
            answer = await client.get(url, timeout=REQUEST_TIMEOUT_S)
            self.pictures.append(answer.content if answer.status_code == 200 else b"")


async def patient(
    client: httpx2.AsyncClient, url: str, body: Body, *, timeout_s: float | None = None
) -> Outcome:
    """Sends a request once and waits for as long as it takes; `timeout_s` is told to the server."""
    outcome, began = Outcome(body), time.perf_counter()
    headers = {} if timeout_s is None else {"x-request-timeout-s": f"{timeout_s:g}"}
    outcome.attempts = 1
    with contextlib.suppress(httpx2.HTTPError):
        response = await client.post(url + PATH, json=body, headers=headers, timeout=REQUEST_TIMEOUT_S)
        outcome.seconds = outcome.last_s = time.perf_counter() - began
        outcome.read(response)
        await outcome.fetch(client)
    return outcome


async def leaving(client: httpx2.AsyncClient, url: str, body: Body, after_s: float) -> Outcome:
    """Sends a request and hangs up after a while, for good."""
    try:
        return await asyncio.wait_for(patient(client, url, body), after_s)
    except TimeoutError:
        return Outcome(body, attempts=1, left=True)


async def resending(client: httpx2.AsyncClient, url: str, body: Body, dice: random.Random) -> Outcome:
    """Does as the official client does: hangs up after 5 s and sends the same body again, for an hour."""
    outcome, began, pause_s = Outcome(body), time.perf_counter(), FIRST_PAUSE_S
    while time.perf_counter() - began < COMES_BACK_FOR_S:
        outcome.attempts += 1
        wait_s = pause_s + dice.random()
        try:
            response = await client.post(url + PATH, json=body, timeout=GIVES_UP_S)
            outcome.read(response)
            if outcome.status not in (429, 503):
                break
            wait_s = outcome.retry_after_s or wait_s
        except httpx2.HTTPError:
            pass
        await asyncio.sleep(wait_s)
        pause_s = min(pause_s * PAUSE_FACTOR, LONGEST_PAUSE_S)
    outcome.seconds = time.perf_counter() - began
    await outcome.fetch(client)
    return outcome


async def capacity(url: str, key: str | None, bodies: Sequence[Body], seconds: float) -> float:
    """Requests of this mix per second when some are always waiting."""
    done, until = 0, time.perf_counter() + seconds

    async def work(number: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            number += 1
            outcome = await patient(client, url, bodies[number % len(bodies)])
            if outcome.status != 200:
                raise RuntimeError(f"a request on the quiet server failed: {outcome.status} {outcome.code}")
            done += 1

    began = time.perf_counter()
    async with many_connections(key) as client:
        await asyncio.gather(*(work(number * 3) for number in range(16)))
    return done / (time.perf_counter() - began)
