"""`mezzotint endpoints warm`: what it asks for, and what it prints of what it is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mezzotint.cli import models
from tests.cli.conftest import Run

CONFIG = """
[[endpoints]]
id = "painter"
model = "emoji"
performance = "max"

[[endpoints]]
id = "other"
"""
CHILD = """
import sys
from mezzotint.messages import decode
length = int.from_bytes(sys.stdin.buffer.read(8), "big")
message = decode(sys.stdin.buffer.read(length))
print("compiling for", message.endpoint_id, message.source, message.settings.performance)
print("compiled for 1 row")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def run_with(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    Path("mezzotint.toml").write_text(CONFIG)

    def running(*arguments: str, status: int = 0) -> object:
        monkeypatch.setattr(models, "COMPILING", (sys.executable, "-c", CHILD, str(status)))
        return run("endpoints", "warm", *arguments)

    return running  # type: ignore[return-value]


def test_progress_goes_to_stderr_and_what_came_of_it_to_stdout(run_with: Run) -> None:
    done = run_with("painter")
    assert (done.returncode, done.stdout) == (0, "compiled for 1 row\n")
    assert "compiling for painter emoji max" in done.stderr
    told = json.loads(run_with("painter", "--json").stdout)
    assert told == {"id": "painter", "form_text": "compiled for 1 row"}


def test_a_failure_is_its_exit_status(run_with: Run) -> None:
    done = run_with("painter", status=1)
    assert (done.returncode, done.stdout) == (1, "")
    assert "compiled for 1 row" in done.stderr


@pytest.mark.parametrize(
    ("id", "words"), [("nobody", "it has: painter, other"), ("other", 'set performance = "max"')]
)
def test_what_cannot_be_compiled_is_refused(id: str, words: str, run_with: Run) -> None:
    done = run_with(id)
    assert done.returncode == 2
    assert words in done.stderr
