"""What breaks around the server: disk, database, clock, signals. The real thing wherever it can be had."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import sqlalchemy as sa

from mezzotint.server.store import database, keys
from mezzotint.server.store.database import usage
from mezzotint.server.threads import DATABASE
from mezzotint.server.work import admission
from tests.attacks import attack
from tests.server.hosting import GENERATE, PATIENCE_S, client, endpoint, hosting, settings_for

NUM_URLS = 6
"""Answers with URLs at once: more than there are threads that make answers."""
START_S = 120.0
"""How long a server with real workers may take to start on a busy machine."""


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A real tmpfs of this size mounted at the folder."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@attack("A full disk", outcome="507, nothing left behind, over when there is room")
def test_a_full_disk_is_507_leaves_nothing_behind_and_passes(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "images"
    with small_disk(folder, "64k"), hosting(settings_for(tmp_path, endpoint("fake:size=128"))) as host:
        answer = host.post(response_format="url", seed=1)  # 49 kB of noise
        assert answer.status_code == 200, answer.text
        before = sorted(folder.iterdir())
        full = host.post(response_format="url", seed=2)
        assert (full.status_code, full.json()["error"]["code"]) == (507, "storage_full")
        assert str(tmp_path) not in full.text
        assert sorted(folder.iterdir()) == before, "nothing half-written stays"
        assert host.post(response_format="png", seed=2).status_code == 200, "answers without files go on"
        before[0].unlink()
        assert host.post(response_format="url", seed=2).status_code == 200
        host.service.quotas.store()
        with host.service.engine.connect() as connection:
            charged = connection.scalar(sa.select(usage.c.images))
        assert charged == 3, "not for the picture that could not be stored"


@attack("Another process holds the database", outcome="pictures are made all the same")
def test_pictures_are_made_while_another_process_holds_the_database(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        other = sqlite3.connect(tmp_path / "data" / "mezzotint.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        assert host.post().status_code == 200
        refused = host.client.put("/dedicated/beta/endpoint/one/sleep")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        other.execute("ROLLBACK")
        other.close()
        assert host.client.put("/dedicated/beta/endpoint/one/sleep").status_code == 200


@attack(
    "Another process holds the database while several keys ask for URLs",
    outcome="no answer waits for it; the gallery has every picture afterwards",
)
def test_a_locked_database_holds_up_no_answer_and_loses_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 1000.0)  # who waits for the lock waits for ever
    monkeypatch.setattr(admission, "LISTED_WITHIN_S", 0.05)
    with hosting(settings_for(tmp_path)) as host, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(host.new_client()) for _ in range(3))
        other = sqlite3.connect(tmp_path / "data" / "mezzotint.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")

        def ask(http: httpx2.Client, seed: int, form: str) -> httpx2.Response:
            return http.post(GENERATE, json=host.body(seed=seed, response_format=form))

        asked = [host.pool.submit(ask, first, seed, "url") for seed in range(NUM_URLS)]
        asked += [host.pool.submit(ask, second, seed, "png") for seed in range(NUM_URLS)]
        asked += [host.pool.submit(ask, third, 0, "url")]
        answers = [each.result() for each in asked]
        assert [answer.status_code for answer in answers] == [200] * len(asked)
        url = answers[0].json()["data"][0]["url"]
        assert httpx2.get(url).status_code == 200
        for path in ("/healthz", "/readyz", "/v1/models", "/dedicated/v1/images"):
            assert second.get(path).status_code == 200, path
        other.execute("ROLLBACK")
        other.close()
        for http, num in ((first, NUM_URLS), (second, 0), (third, 1)):
            assert len(http.get("/dedicated/v1/images").json()["data"]) == num


@attack("The end of the server while another process holds the database", outcome="the server ends")
def test_a_locked_database_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 1000.0)
    monkeypatch.setattr(admission, "LISTED_WITHIN_S", 0.05)
    with contextlib.ExitStack() as stack:
        with hosting(settings_for(tmp_path)) as host:
            file = tmp_path / "data" / "mezzotint.db"
            other = stack.enter_context(contextlib.closing(sqlite3.connect(file, isolation_level=None)))
            other.execute("BEGIN EXCLUSIVE")
            assert host.post(response_format="url").status_code == 200
            monkeypatch.setattr(DATABASE, "limit_s", 0.2)
        assert other.in_transaction


@attack("A key that cannot be looked up within the request's own deadline", outcome="504 at the deadline")
def test_a_deadline_holds_for_the_look_up_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hosting(settings_for(tmp_path)) as host:
        look_up, answers = keys.authenticate, threading.Event()

        def slow(*values: Any) -> keys.Key:
            assert answers.wait(PATIENCE_S)
            return look_up(*values)

        monkeypatch.setattr(keys, "authenticate", slow)
        late = host.post(headers={"x-request-timeout-s": "0.1"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        answers.set()
        assert host.post(headers={"x-request-timeout-s": "20"}).status_code == 200


@attack("The clock jumps", outcome="no request ends by it")
def test_a_jump_of_the_clock_ends_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.01"))) as host:
        for jump in (1e8, -1e8):
            running = host.submit("steady", num_inference_steps=30)
            host.wait_until(running, "running")
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            host.wait_until(running, "done")
        url = host.post(response_format="url").json()["data"][0]["url"]
        assert httpx2.get(url).status_code == 200
        monkeypatch.setattr(time, "time", real)
        assert httpx2.get(url).status_code == 410, "made in the past, expired now"


@dataclass
class Process:
    """A server in a process of its own."""

    url: str
    key: str
    process: subprocess.Popen[str]

    def children(self) -> list[psutil.Process]:
        """The forkserver, its helpers and what it has forked."""
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def worker(self) -> psutil.Process:
        """The one process that the forkserver has forked."""
        (worker,) = [child for child in self.children() if child.ppid() != self.process.pid]
        return worker

    def process_of_forks(self) -> psutil.Process:
        """The forkserver."""
        return self.worker().parent()

    def start_request(self, pool: ThreadPoolExecutor, steps: int) -> Future[httpx2.Response]:
        """A request that runs, with a connection waiting for it, when this returns."""
        body = {"model": "one", "prompt": "x", "num_inference_steps": steps, "response_format": "png"}
        headers = {"idempotency-key": f"{steps} steps"}
        with client(self.url, self.key) as http:
            joined = self._num_joined(http)
            asked = http.post(GENERATE, json=body, headers=headers | {"prefer": "respond-async"})
            assert asked.status_code == 202
            waiting = pool.submit(self._ask, body, headers)
            end = time.monotonic() + PATIENCE_S
            while self._num_joined(http) == joined:
                assert time.monotonic() < end, "the waiting connection never joined"
        return waiting

    def _ask(self, body: dict[str, object], headers: dict[str, str]) -> httpx2.Response:
        with client(self.url, self.key) as http:
            return http.post(GENERATE, json=body, headers=headers)

    def _num_joined(self, http: httpx2.Client) -> str:
        lines = http.get("/metrics").text.splitlines()
        return next((line for line in lines if line.startswith("mezzotint_joined_total{")), "")


@contextlib.contextmanager
def server_process(folder: Path, drain_s: float, **models: Path) -> Iterator[Process]:
    command = [sys.executable, "-m", "tests.server.standalone", str(folder), str(drain_s)]
    command += [f"{name}={model}" for name, model in models.items()]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        url, key = process.stdout.readline().split()
        server = Process(url, key, process)
        children: list[psutil.Process] = []
        try:
            with client(url, key) as http:  # once it has answered, its worker is there
                http.timeout = START_S
                body = {"model": "one", "prompt": "x", "num_inference_steps": 1}
                assert http.post(GENERATE, json=body).status_code == 200
            children = server.children()
            yield server
        finally:
            for one in [*children, psutil.Process(process.pid)] if process.poll() is None else children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait(PATIENCE_S)
            process.stdout.close()


@attack("SIGTERM during requests", outcome="they have drain_s to end")
def test_sigterm_lets_running_requests_finish(tmp_path: Path) -> None:
    with server_process(tmp_path, 20) as server, ThreadPoolExecutor() as pool:
        running = server.start_request(pool, 50)
        server.process.send_signal(signal.SIGTERM)
        assert running.result(PATIENCE_S).status_code == 200
        server.process.wait(PATIENCE_S)
        assert "requests dropped" not in (tmp_path / "log").read_text()


@attack("SIGTERM during a request that does not end", outcome="503 after drain_s; the server ends")
def test_sigterm_ends_what_does_not_finish_in_time_and_says_so(tmp_path: Path) -> None:
    with server_process(tmp_path, 1) as server, ThreadPoolExecutor() as pool:
        worker = server.worker()
        worker.suspend()  # nothing can finish any more
        running = [server.start_request(pool, steps) for steps in (48, 49, 50)]
        server.process.send_signal(signal.SIGTERM)
        for one in running:
            answer = one.result(PATIENCE_S)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_stopping")
        server.process.wait(PATIENCE_S)
        assert '"num": 3' in (tmp_path / "log").read_text()
        assert not worker.is_running()


@attack("SIGTERM while the forkserver is stopped", outcome="the server ends")
def test_a_stopped_forkserver_does_not_block_sigterm(tmp_path: Path) -> None:
    """Neither where a worker has exited and nobody says so, nor where the start of another never ends."""
    with server_process(tmp_path, 1) as server, client(server.url, server.key) as http:
        worker = server.worker()
        server.process_of_forks().suspend()
        assert http.put("/dedicated/beta/endpoint/one/restart").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(PATIENCE_S)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@attack("kill -9 of the server", outcome="its workers end")
def test_workers_do_not_outlive_a_server_that_was_killed(tmp_path: Path) -> None:
    with server_process(tmp_path, 1) as server:
        children = server.children()
        assert server.worker() in children
        os.kill(server.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
        assert not alive


# ---------------------------------------------------------------- models on disk, in real workers


BASE = "/dedicated/beta/endpoint"


@dataclass
class Studio:
    """A server with two real models, each in a folder of its own."""

    server: Process
    http: httpx2.Client
    log: Path
    folder: Path
    """Of endpoint `one`."""
    copy: Path

    def post(self, model: str) -> httpx2.Response:
        body = {
            "model": model,
            "prompt": "a fox",
            "num_inference_steps": 2,
            "response_format": "raw",
            "seed": 1,
        }
        return self.http.post(GENERATE, json=body)

    def picture(self, model: str = "one") -> str:
        answer = self.post(model)
        assert answer.status_code == 200, answer.text
        data: str = answer.json()["data"][0]["b64_json"]
        return data

    def put(self, verb: str) -> None:
        assert self.http.put(f"{BASE}/one/{verb}").status_code == 200

    def wait_until(self, status: str, message: str = "") -> str:
        """Waits until endpoint `one` has this status and a message with these words."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            found = self.http.get(f"{BASE}/one/status").json()
            if found["status"] == status and message in (found["message"] or ""):
                return str(found["message"] or "")
        raise AssertionError(f"endpoint one is {found}")

    def kill_worker(self) -> None:
        pid = self.http.get(f"{BASE}/one").json()["mezzotint"]["replicas"][0]["pid"]
        os.kill(pid, signal.SIGKILL)

    def refused(self) -> None:
        """Endpoint `one` says that it has failed and not where its files are; the other one works."""
        answer = self.post("one")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "endpoint_failed")
        assert str(self.folder) not in answer.text
        assert self.picture("two")

    def mend(self) -> None:
        """Puts the whole folder back and restarts the endpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.copy, self.folder)
        self.put("restart")
        assert self.wait_until("RUNNING") == "", "what was wrong is told no more"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    import torch

    from tests.engine import tiny

    folder = tmp_path_factory.mktemp("studio")
    one, two, copy = (folder / name for name in ("one", "two", "copy"))
    tiny.save(
        "flux", copy, torch.bfloat16, sizes=[(32, 32)]
    )  # in the endpoints' own type the weights stay mapped files
    for place in (one, two):
        shutil.copytree(copy, place)
    with server_process(folder, 1, one=one, two=two) as server, client(server.url, server.key) as http:
        http.timeout = START_S
        yield Studio(server, http, folder / "log", one, copy)


def test_a_model_folder_that_vanishes_is_noticed_at_the_next_start(studio: Studio) -> None:
    before = studio.picture()
    shutil.rmtree(studio.folder)
    assert studio.picture() == before, "a loaded model keeps what was removed"

    studio.put("restart")  # the old worker stays until the new one is ready, which it never is
    said = studio.wait_until("RUNNING", "was not found")
    assert str(studio.folder) in said
    assert studio.picture() == before

    studio.kill_worker()
    said = studio.wait_until("FAILED", "was not found")
    assert str(studio.folder) in said
    studio.refused()
    studio.mend()
    assert studio.picture() == before

    studio.put("sleep")
    studio.wait_until("SLEEPING")
    shutil.rmtree(studio.folder)
    studio.refused()  # the request woke it
    studio.wait_until("FAILED", "was not found")
    studio.mend()
    assert studio.picture() == before


@attack("Weights that are cut short", outcome="their endpoint fails, no other")
def test_weights_that_are_cut_short_fail_their_endpoint_and_no_other(studio: Studio) -> None:
    before = studio.picture()
    for weights in studio.folder.rglob("*.safetensors"):
        os.truncate(weights, weights.stat().st_size // 2)
    studio.refused()  # the worker lost what it had mapped, and the next one saw that it is damaged
    said = studio.wait_until("FAILED", "is damaged or cut short")
    assert str(studio.folder) in said
    assert ".safetensors" in said
    studio.refused()
    studio.mend()
    assert studio.picture() == before


def test_killed_workers_leave_no_semaphore_behind(studio: Studio) -> None:
    """The last test of this server: only when it ends does Python tell of what was left."""
    studio.kill_worker()
    assert studio.picture()
    children = studio.server.children()
    studio.server.process.send_signal(signal.SIGTERM)
    studio.server.process.wait(PATIENCE_S)
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
    assert not alive
    assert "leaked" not in studio.log.read_text()
