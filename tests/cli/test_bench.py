from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from mezzotint.load.arrivals import Arrival
from mezzotint.load.generator import Target
from mezzotint.load.generator import run as send
from tests.cli.conftest import Run
from tests.conftest import Fake
from tests.serving import serving

SHORT = ("--seconds", "1", "--rate", "20", "--steps", "1,2", "--n", "1:3,2:1", "--out", "found")


def test_a_run_against_a_server_gives_figures_a_file_and_a_plot(run: Run, fake: Fake) -> None:
    done = run("bench", *SHORT, "--json", "--data-dir", str(fake.settings.data_dir))
    assert done.returncode == 0, done.stderr
    printed, written = json.loads(done.stdout), json.loads(Path("found.json").read_text())
    assert printed["done"] == printed["requests"] == printed["asked"]["planned"] > 5
    assert printed["refused"] == {}
    assert printed["latency_s"]["p50"] <= printed["latency_s"]["p95"] <= printed["latency_s"]["p99"]
    assert len(written["requests_sent"]) == printed["requests"]
    assert {shape["steps"] for shape in written["lone_s"]} == {1, 2}
    assert Path("found.svg").read_text().count("<circle") == printed["requests"]
    again = run("bench", *SHORT, "--data-dir", str(fake.settings.data_dir))
    assert again.returncode == 0, again.stderr
    assert "within 3 times alone" in again.stdout
    names = ("seconds", "steps", "n", "seed")
    first, second = (
        [[one[name] for name in names] for one in found["requests_sent"]]
        for found in (written, json.loads(Path("found.json").read_text()))
    )
    assert first == second


def strange_server(bodies: list[dict[str, Any]], answer: Callable[[int], int]) -> FastAPI:
    """A server of OpenAI's API that answers its k-th request with the status `answer(k)`."""
    app = FastAPI()

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> JSONResponse:
        bodies.append(await request.json())
        return JSONResponse({"data": []}, answer(len(bodies)))

    return app


def test_a_trace_is_replayed_exactly_and_refusals_are_counted(run: Run) -> None:
    trace = [
        {"seconds": 0.0, "steps": 3, "n": 2, "adapter": "ink", "size": "64x32", "seed": 5},
        {"seconds": 0.1, "steps": 3, "n": 2, "size": "64x32", "seed": 6},
        {"seconds": 0.2, "steps": 3, "n": 2, "size": "64x32", "seed": 7},
    ]
    Path("trace.jsonl").write_text("\n".join(json.dumps(line) for line in trace))
    bodies: list[dict[str, Any]] = []
    with serving(strange_server(bodies, lambda number: 429 if number >= 5 else 200)) as url:
        asked = (
            "--api",
            "openai",
            "--endpoint",
            "them",
            "--trace",
            "trace.jsonl",
            "--out",
            "found",
            "--json",
        )
        done = run("bench", "--url", f"{url}/v1", *asked)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["done"], found["refused"]) == (1, {"429": 2})
    sent = bodies[3:]  # before them: one to warm, two for the lone time
    assert [body["seed"] for body in sent] == [5, 6, 7]
    assert [body["model"] for body in sent] == ["them:ink", "them", "them"]
    assert all((body["num_inference_steps"], body["n"], body["size"]) == (3, 2, "64x32") for body in sent)


def test_another_server_gets_only_what_its_api_has(run: Run) -> None:
    bodies: list[dict[str, Any]] = []
    with serving(strange_server(bodies, lambda _: 200)) as url:
        asked = (
            "--api",
            "openai",
            "--endpoint",
            "them",
            "--seconds",
            "0.5",
            "--rate",
            "10",
            "--out",
            "found",
        )
        done = run("bench", "--url", url, *asked)
    assert done.returncode == 0, done.stderr
    assert {name for body in bodies for name in body} == {"model", "prompt", "n", "response_format"}


def test_a_run_that_is_stopped_returns_what_it_has() -> None:
    async def stopped(url: str) -> None:
        target = Target(url, "them", "openai")
        arrivals = [Arrival(0.0, 1), Arrival(3600.0, 1)]
        answered = asyncio.Event()
        task = asyncio.create_task(send(target, arrivals, lambda *_: answered.set()))
        await answered.wait()
        task.cancel()
        measured = await task
        assert measured.stopped
        assert [each.status for each in measured.sent] == [200]

    with serving(strange_server([], lambda _: 200)) as url:
        asyncio.run(stopped(url))


def test_a_request_is_sent_at_its_moment_though_none_is_answered() -> None:
    async def unanswered() -> float:
        connections: list[asyncio.StreamWriter] = []
        server = await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        target = Target(f"http://127.0.0.1:{port}", "them", "openai", timeout_s=0.3)
        began = time.perf_counter()
        measured = await send(target, [Arrival(0.01 * number, 1) for number in range(40)])
        assert [each.status for each in measured.sent] == [0] * 40
        seconds = time.perf_counter() - began
        for each in connections:
            each.close()
        server.close()
        await server.wait_closed()
        return seconds

    assert asyncio.run(unanswered()) < 40 * 0.3 / 2  # one after the other would take 12 s


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--api", "other"), "--api must be"),
        (("--arrivals", "daily"), "--arrivals must be poisson or bursty"),
        (("--steps", "51"), "--steps: values must be 1 to 50 (got 51)"),
        (("--n", "1:0"), "--n: each part is VALUE:SHARE"),
        (("--sizes", "large"), "--sizes: values must be like 512x512"),
        (("--trace", "none.csv"), "cannot be read"),
        (("--adapters", "3"), "--adapters 3: emoji has 0 (none)"),
    ],
)
def test_bad_input_is_a_sentence(arguments: tuple[str, ...], complaint: str, run: Run, fake: Fake) -> None:
    done = run("bench", *arguments, "--data-dir", str(fake.settings.data_dir))
    assert done.returncode == 2
    assert complaint in done.stderr


def test_a_server_that_is_not_there_is_a_sentence(run: Run) -> None:
    done = run("bench", "--url", "http://127.0.0.1:9", "--endpoint", "x")
    assert done.returncode == 3
    assert "does not answer a lone request" in done.stderr
