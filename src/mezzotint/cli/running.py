"""The servers that this user runs: how they make themselves known, and how commands find them.

A running server writes SERVER_FILE into its data folder: where it is and what it was started with. The user's
state folder has one file per such data folder, which names it. Whoever finds a server through them has it
prove that it runs on that folder: after a crash another program may listen on its port, and would be sent a
key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezzotint.config import Settings

SERVER_FILE = "server.json"
"""In the data folder while a server runs on it."""
PROOF_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Running:
    """A server that runs on a data folder of this machine."""

    url: str
    pid: int
    data_dir: str
    """Absolute."""
    config: str | None = None
    """The configuration file that it was started with, absolute."""
    database: str = "sqlite"
    """The kind of its database, as SQLAlchemy names it."""


def state_folder() -> Path:
    """Where this platform keeps what a program remembers for its user; ours in it."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "mezzotint" / "servers"


@contextlib.contextmanager
def announced(settings: Settings, url: str, config: Path | None) -> Iterator[None]:
    """While the block runs, commands of this user find the server."""
    folder = settings.data_dir.resolve()
    database = (settings.database_url or "sqlite").partition(":")[0].partition("+")[0]
    running = Running(url, os.getpid(), str(folder), str(config.resolve()) if config else None, database)
    own, text = folder / SERVER_FILE, json.dumps(asdict(running))
    record = state_folder() / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    own.write_text(text)
    with contextlib.suppress(OSError):  # a home that cannot be written: found in its own folder only
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        record.write_text(str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if own.read_text() == text:  # not another server's that came later
                own.unlink()
                record.unlink()


def running_on(data_dir: Path) -> Running | None:
    """The server that runs on this data folder; None when there is none."""
    running = _announced_on(data_dir)
    return running if running is not None and _proves(running, data_dir) else None


def running_servers() -> list[Running]:
    """Every server that this user has running; records of those that are gone are removed."""
    found = []
    for record in sorted(state_folder().glob("*")):
        try:
            data_dir = Path(record.read_text())
        except (OSError, ValueError):
            continue
        running = _announced_on(data_dir)
        if running is not None and _proves(running, data_dir):
            found.append(running)
        elif running is None or not _lives(running.pid):
            with contextlib.suppress(OSError):
                record.unlink()
    return sorted(found, key=lambda each: each.url)


def _announced_on(data_dir: Path) -> Running | None:
    try:
        values = json.loads((data_dir / SERVER_FILE).read_text())
        running = Running(**values | {"data_dir": str(data_dir.resolve())})
        return running if isinstance(running.url, str) and isinstance(running.pid, int) else None
    except (OSError, ValueError, TypeError):
        return None


def _proves(running: Running, data_dir: Path) -> bool:
    """Whether what answers at the address holds the secret of the data folder."""
    import httpx2

    from mezzotint.errors import ConfigError
    from mezzotint.server.store.signing import load_signer

    challenge = secrets.token_hex(16)
    try:
        answer = httpx2.get(
            f"{running.url}/healthz", params={"challenge": challenge}, timeout=PROOF_TIMEOUT_S
        )
        told = answer.json()["proof"]
        return bool(told == load_signer(data_dir).proof(challenge))
    except (OSError, ValueError, KeyError, TypeError, ConfigError, httpx2.HTTPError, httpx2.InvalidURL):
        return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
