"""A PostgreSQL server of the tests' own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa

OWNER = "postgres"
"""The system's user for the server, which refuses to run as root; Debian's package makes it."""


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's programs."""
    programs = [Path(found).parent for found in (shutil.which("initdb"),) if found]
    programs += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return programs[0] if programs else None


@contextlib.contextmanager
def private_postgres() -> Iterator[Callable[[], str]]:
    """A server without a network port; what it gives makes an empty database and answers its URL."""
    programs = find_postgres()
    assert programs is not None, "the caller has looked"
    with tempfile.TemporaryDirectory(prefix="mezzotint-postgres-") as name:
        folder = Path(name)
        data = folder / "data"
        user = OWNER if os.geteuid() == 0 else None
        if user:
            shutil.chown(folder, user)

        def call(program: str, *arguments: str | Path) -> None:
            done = subprocess.run(
                [programs / program, *arguments],
                user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr

        call("initdb", "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        call("pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        server = sa.create_engine(_url(folder, "postgres"), isolation_level="AUTOCOMMIT")

        def make() -> str:
            database = f"test_{uuid4().hex}"
            with server.connect() as connection:
                connection.execute(sa.text(f"CREATE DATABASE {database}"))
            return _url(folder, database)

        try:
            yield make
        finally:
            server.dispose()
            call("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


def _url(folder: Path, database: str) -> str:
    return f"postgresql+psycopg://tests@/{database}?host={folder}"
