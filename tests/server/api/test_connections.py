"""Connections on which no proper request comes: strangers cost next to nothing."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from mezzotint.server import app as server
from tests.attacks import attack
from tests.server.hosting import GENERATE, PATIENCE_S, Host, client, hosting, settings_for

ROOT = Path(__file__).parents[3]
MOST = 12


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "max_connections", lambda: MOST)
        with hosting(settings_for(tmp_path_factory.mktemp("server"), body_timeout_s=0.5)) as running:
            yield running


def answer_to(host: Host, request: bytes) -> bytes:
    """All that comes back until the server ends the connection."""
    with host.connect() as connection:
        connection.sendall(request)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def head(*lines: str, method: str = "POST", path: str = GENERATE) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


@attack("A connection that sends nothing", outcome="ends after body_timeout_s")
@attack("A request head that never ends", outcome="the connection ends after body_timeout_s")
@pytest.mark.parametrize("beginning", [b"", b"POST / HTTP/1.1\r\nHost: x\r\n", b"G"])
def test_a_connection_without_a_request_ends(host: Host, beginning: bytes) -> None:
    assert answer_to(host, beginning) == b""


@attack("A second request head that never ends, on a kept connection", outcome="the connection ends")
def test_a_kept_connection_without_another_request_ends(host: Host) -> None:
    answer = answer_to(host, head(method="GET", path="/healthz") + b"GET / HT")
    assert answer.startswith(b"HTTP/1.1 200")


@attack("A request head of 1 MiB", outcome="400 or a closed connection; at most 64 KiB are kept")
def test_a_huge_head_is_refused(host: Host) -> None:
    with host.connect() as connection:
        try:
            for _ in range(1024):
                connection.sendall(b"GET / HTTP/1.1\r\n" if _ == 0 else b"x: " + b"a" * 1000 + b"\r\n")
        except OSError:
            return
        assert not read_all(connection).startswith(b"HTTP/1.1 2")


@attack(
    "Content-Length together with Transfer-Encoding (request smuggling)",
    outcome="400 ambiguous_length, and the connection ends",
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_request_with_two_lengths_is_refused(host: Host, method: str) -> None:
    lines = ("Content-Type: application/json", "Content-Length: 5", "Transfer-Encoding: chunked")
    answer = answer_to(host, head(*lines, method=method) + b"0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"ambiguous_length" in answer
    assert answer.count(b"HTTP/1.1") == 1


@attack("A stranger announces a body and sends it slowly", outcome="401 before any of it is read or kept")
@pytest.mark.parametrize(
    "path",
    [GENERATE, "/v1/images/edits", "/sdapi/v1/png-info", "/dedicated/beta/endpoint"],
)
def test_a_stranger_is_refused_before_the_body_is_read(host: Host, path: str) -> None:
    answer = answer_to(host, head("Content-Type: application/json", "Content-Length: 900000", path=path))
    assert answer.startswith(b"HTTP/1.1 401"), "and the connection ends although the body never came"


@attack("An ordinary key sends an admin's body", outcome="403 before any of it is read or parsed")
def test_an_admins_body_is_read_from_an_admin_only(host: Host) -> None:
    with host.new_client() as plain:
        authorization = f"Authorization: {plain.headers['authorization']}"
    lines = (authorization, "Content-Type: application/json", "Content-Length: 900000")
    for path in ("/dedicated/beta/endpoint", "/dedicated/beta/endpoint/one/adapters"):
        assert answer_to(host, head(*lines, path=path)).startswith(b"HTTP/1.1 403")


@attack("Idle connections up to the limit", outcome="the oldest without a request makes room for the next")
def test_idle_connections_make_room(host: Host) -> None:
    idle = [host.connect() for _ in range(3 * MOST)]
    try:
        with client(host.url, host.first_key) as http:
            assert http.get("/v1/models").status_code == 200
        assert host.call(lambda: len(host.app.state.server.server_state.connections)) <= MOST
    finally:
        for each in idle:
            each.close()


# ------------------------------------------------------------ in a process of its own


@pytest.fixture
def small_server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx2.Client]]:
    """A server with 200 file descriptors, whose stderr nobody reads until the test does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.standalone", str(tmp_path), "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    url, key = process.stdout.readline().decode().split()
    try:
        with client(url, key) as http:
            yield process, http
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ready_pid(http: httpx2.Client) -> int | None:
    spec = http.get("/dedicated/beta/endpoint/one").json()["mezzotint"]
    pid: int | None = spec["replicas"][0]["pid"] if spec["state"] == "ready" else None
    return pid


def wait_for_worker(http: httpx2.Client, other_than: int | None = None) -> int:
    body = {"model": "one", "prompt": "a cat", "num_inference_steps": 1, "response_format": "png"}
    answer = http.post(GENERATE, json=body)  # which waits for the worker
    assert answer.status_code == 200, answer.text
    pid = ready_pid(http)
    assert pid is not None
    assert pid != other_than
    return pid


@attack(
    "Idle connections up to the limit of descriptors while a worker dies",
    outcome="a new worker starts, requests go on, the log stays small",
)
@attack("A reader of stderr that stalls", outcome="requests go on, and SIGTERM ends the server")
def test_neither_idle_connections_nor_a_stalled_log_stop_the_server(
    small_server: tuple[subprocess.Popen[bytes], httpx2.Client], request: pytest.FixtureRequest
) -> None:
    process, http = small_server
    pid = wait_for_worker(http)
    url = http.base_url
    for _ in range(300):
        idle = socket.create_connection((url.host, url.port or 80), timeout=PATIENCE_S)
        request.addfinalizer(idle.close)
    os.kill(pid, signal.SIGKILL)
    wait_for_worker(http, other_than=pid)
    body = json.dumps({"model": "one", "prompt": "a cat", "num_inference_steps": 1, "response_format": "png"})
    for _ in range(40):  # with a line of log each: more than the pipe holds
        assert http.post(GENERATE, content=body, headers={"content-type": "application/json"}).is_success
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM)
    assert process.stderr is not None
    assert len(process.stderr.read()) < 100_000
