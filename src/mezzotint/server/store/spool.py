"""Bytes on disk that are needed only while the server runs: files without names, gone with the process."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

SEGMENT_BYTES = 64 * 2**20
"""A file that holds this much takes no more; it ends when nobody needs anything in it."""


class _Segment:
    def __init__(self, folder: Path) -> None:
        self.fd, name = tempfile.mkstemp(dir=folder, prefix="spool-")
        os.unlink(name)
        self.size = 0
        weakref.finalize(self, os.close, self.fd)


@dataclass(frozen=True, slots=True)
class Spooled:
    """Bytes that were written to a spool. They stay readable for as long as this object lives."""

    segment: _Segment
    begin: int
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes from `start` on (blocking)."""
        return os.pread(self.segment.fd, min(size, self.size - start), self.begin + start)


class Spool:
    """Takes bytes from any thread; the files are in `folder`, which must exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segment: _Segment | None = None
        self._lock = threading.Lock()

    def write(self, data: bytes) -> Spooled:
        """Puts bytes on disk (blocking); OSError when they do not fit, and then nothing is taken."""
        with self._lock:
            segment = self._segment
            if segment is None or segment.size >= SEGMENT_BYTES:
                segment = self._segment = _Segment(self._folder)
            begin, written = segment.size, 0
            while written < len(data):
                written += os.pwrite(segment.fd, memoryview(data)[written:], begin + written)
            segment.size += written
            return Spooled(segment, begin, written)
