"""Structured logging, set up once per process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import threading
from collections import deque
from typing import Literal, TextIO, cast

import structlog

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


MAX_WAITING = 4 * 2**20
"""Characters of log lines that may wait for a reader of stderr."""
LAST_LINES_S = 1.0
"""How long the end of the process waits for that reader."""


class _Stderr:
    """The stderr of the moment, written to by a thread of its own, because its reader may stall.

    A line that cannot be written, or that finds too many waiting, is lost; the request it speaks of is not.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._size = 0
        self._num_lost = 0
        self._writing = False
        self._changed = threading.Condition()
        """Guards all of the above."""
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> None:
        with self._changed:
            if self._size + len(text) > MAX_WAITING:
                self._num_lost += 1
                return
            if self._num_lost:
                text = f"({self._num_lost} log lines were lost: nobody read them in time)\n{text}"
                self._num_lost = 0
            self._lines.append(text)
            self._size += len(text)
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="log", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread now: the next line tries again
                    self._thread.start()

    def flush(self, timeout_s: float = 0.0) -> None:
        """Waits until all lines are written, or for `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines and not self._writing, timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines)
                text = "".join(self._lines)
                self._lines.clear()
                self._size, self._writing = 0, True
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(text)
                sys.stderr.flush()


_STDERR = _Stderr()
atexit.register(_STDERR.flush, LAST_LINES_S)


def flush(timeout_s: float = LAST_LINES_S) -> None:
    """Waits until all lines are on stderr, or for `timeout_s`."""
    _STDERR.flush(timeout_s)


def configure(level: str, form: Literal["console", "json"]) -> None:
    """Log lines go to stderr from now on; `request_id` and what else is bound stand on every line.

    Tracebacks are plain: the values of variables would show keys and prompts, and take seconds to draw. Lines
    of libraries that use the standard library's logging appear from `warning` up.
    """
    last: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=24, exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info] if form == "json" else []),
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _STDERR)),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(
        level=logging.WARNING, stream=cast(TextIO, _STDERR), format="%(levelname)s %(name)s: %(message)s"
    )
