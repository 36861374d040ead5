"""Logging must never fail what it speaks of."""

from __future__ import annotations

import io
import sys
from typing import Literal

import pytest
import structlog

from mezzotint.server import logs
from tests.attacks import attack
from tests.server.hosting import PATIENCE_S


class Full(io.StringIO):
    """A stderr on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@attack("A log on a full disk, or closed", outcome="the line is lost, the request is not")
@pytest.mark.parametrize("stream", [Full(), closed()], ids=["full", "closed"])
def test_a_log_line_that_cannot_be_written_fails_nothing(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = structlog.get_config()
    try:
        logs.configure("info", "console")
        monkeypatch.setattr(sys, "stderr", stream)
        structlog.get_logger("test").info("request ended", status="done")
    finally:
        logs.flush(PATIENCE_S)
        structlog.configure(**before)


def test_lines_go_to_the_stderr_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    try:
        logs.configure("info", "json")
        structlog.get_logger("test").info("request ended", status="done")
    finally:
        logs.flush(PATIENCE_S)
        structlog.configure(**before)
    assert '"status": "done"' in capsys.readouterr().err


@attack("A crash that would log keys and prompts", outcome="tracebacks have no values")
@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_where_it_was_and_no_values(
    form: Literal["console", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    before = structlog.get_config()

    def fail(authorization: str) -> None:
        raise ValueError("broken")

    try:
        logs.configure("info", form)
        try:
            fail("Bearer " + "-".join(("mz", "a", "key")))
        except ValueError:
            structlog.get_logger("test").exception("defect in a request")
    finally:
        logs.flush(PATIENCE_S)
        structlog.configure(**before)
    shown = capsys.readouterr().err
    assert "ValueError: broken" in shown
    assert "in fail" in shown
    assert "mz-a-key" not in shown
