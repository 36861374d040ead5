"""Starts and stops the servers that the benchmarks measure, sends them requests, and prints results.

Everything listens on 127.0.0.1 and ends with the block that started it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

import mezzotint
from mezzotint.server.store.database import database_url, open_database
from mezzotint.server.store.keys import create_key

BUILT_IN = Path(mezzotint.__file__).parent / "models" / "emoji"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 600.0
SIZE = int(os.environ.get("BENCHMARK_SIZE", "128"))
"""Width and height of every picture, always sent, for plain diffusers' own default may be another."""
Body = dict[str, Any]
Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers; `started_s` is from its command to readiness."""

    url: str
    process: psutil.Process
    data_dir: Path
    started_s: float

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live: children of the server's forkserver."""
        return [child for child in self.process.children(recursive=True) if self._is_worker(child)]

    def _is_worker(self, child: psutil.Process) -> bool:
        try:
            return bool(child.ppid() != self.process.pid and child.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def is_ready(self) -> bool:
        return bool(httpx2.get(f"{self.url}/readyz", timeout=30.0).status_code == 200)

    def new_key(self, name: str, *, admin: bool = False) -> tuple[str, str]:
        """The id and the secret of a new key, for a server that runs with `auth`."""
        engine = open_database(database_url(self.data_dir, None))
        try:
            key, secret = create_key(engine, name, admin=admin)
        finally:
            engine.dispose()
        return key.id, secret

    def stop(self) -> None:
        """Ends the server before its block does, for what is to be read afterwards."""
        self.process.terminate()
        self.process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def mezzotint_server(
    model: str = "emoji",
    *,
    num_threads: int = 1,
    endpoint: Mapping[str, Value] | None = None,
    adapters: Mapping[str, str] | None = None,
    server: Mapping[str, Value] | None = None,
    data_dir: Path | None = None,
    log: Path | None = None,
) -> Iterator[Running]:
    """`mezzotint serve` on a free port without keys, hosting `model` as the endpoint `emoji`.

    A model `fake:...` is painted by workers without a model (fake_worker.py says what follows the colon).
    `adapters` has sources by route; `server` and `endpoint` are further settings; `log` takes the log lines.
    """
    with tempfile.TemporaryDirectory(prefix="mezzotint-benchmark-") as folder:
        data_dir = data_dir or Path(folder) / "data"
        fields = {
            "data_dir": str(data_dir),
            "port": 0,
            "auth": False,
            "log_level": "warning",
            **(server or {}),
        }
        hosted = {"id": "emoji", "model": model, "num_threads": num_threads, **(endpoint or {})}
        lines = ["[server]", *_toml(fields), "[[endpoints]]", *_toml(hosted)]
        for route, source in (adapters or {}).items():
            lines += ["[[endpoints.adapters]]", *_toml({"route": route, "source": source})]
        config = Path(folder) / "mezzotint.toml"
        config.write_text("\n".join(lines))
        program = ["benchmarks.fake_server"] if model.startswith("fake") else ["mezzotint", "serve"]
        with _started(["-m", *program, "--config", str(config)], data_dir, num_threads, log) as running:
            yield running


def _toml(values: Mapping[str, Value]) -> list[str]:
    return [f"{name} = {json.dumps(value)}" for name, value in values.items()]


@contextlib.contextmanager
def baseline_server(
    model: str = str(BUILT_IN), *, num_threads: int = 1, dtype: str = "bf16"
) -> Iterator[Running]:
    """benchmarks/baseline_server.py on a free port."""
    with tempfile.TemporaryDirectory(prefix="mezzotint-benchmark-") as folder:
        command = ["-m", "benchmarks.baseline_server", model, folder, "--dtype", dtype]
        with _started(command, Path(folder), num_threads) as running:
            yield running


def fake_server() -> contextlib.AbstractContextManager[Running]:
    """The server process with workers that paint in no time; it soon forgets its answers."""
    settings: dict[str, Value] = {"log_level": "error", "idempotency_ttl_s": 10}
    return mezzotint_server("fake:step_s=0.0001,size=16", server=settings)


@contextlib.contextmanager
def _started(
    arguments: Sequence[str], data_dir: Path, num_threads: int, log: Path | None = None
) -> Iterator[Running]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "MEZZOTINT_CONFIG": ""}
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(log.open("ab")) if log else None
        child = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=lines
        )
    try:
        url = _wait_until_ready(child, data_dir / "server.json", began + START_TIMEOUT_S)
        yield Running(url, psutil.Process(child.pid), data_dir, time.perf_counter() - began)
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_until_ready(child: subprocess.Popen[bytes], file: Path, until: float) -> str:
    while time.perf_counter() < until:
        if child.poll() is not None:
            raise SystemExit(f"the server ended with status {child.returncode}; its complaint is above")
        with contextlib.suppress(OSError, ValueError, httpx2.HTTPError):
            url = str(json.loads(file.read_text())["url"])
            if httpx2.get(f"{url}/readyz", timeout=5.0).status_code == 200:
                return url
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {START_TIMEOUT_S:g} s")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: HTTP status (0: nothing), seconds as the client saw them, and the picture's bytes."""

    status: int
    seconds: float
    picture: bytes = b""


def body(prompt: str, steps: int, seed: int, guidance: float | None = None) -> Body:
    """A request for a PNG of SIZE x SIZE from the endpoint `emoji`."""
    fields = {"model": "emoji", "prompt": prompt, "num_inference_steps": steps, "seed": seed}
    return {**fields, "guidance_scale": guidance, "response_format": "png", "width": SIZE, "height": SIZE}


async def post(client: httpx2.AsyncClient, url: str, request: Body) -> Answer:
    """One request, once; no retries, so that what is lost shows."""
    began = time.perf_counter()
    try:
        response = await client.post(
            f"{url}/dedicated/v1/images/generations", json=request, timeout=REQUEST_TIMEOUT_S
        )
    except httpx2.HTTPError:
        return Answer(0, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    if response.status_code != 200:
        return Answer(response.status_code, seconds)
    return Answer(200, seconds, base64.b64decode(response.json()["data"][0]["b64_json"]))


def many_connections(key: str | None = None) -> httpx2.AsyncClient:
    """A client that queues nothing on its own side."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None), headers=headers)


def report(name: str, rows: Sequence[tuple[str, str]], facts: Mapping[str, Any]) -> None:
    """A small table for people, then one line of JSON for programs."""
    width = max(len(label) for label, _ in rows)
    print(f"\n{name}")
    for label, value in rows:
        print(f"  {label.ljust(width)}  {value}")
    print(json.dumps({"benchmark": name, **facts}))
