"""The adapter files that a node keeps, by their SHA-256, for all workers there.

What nobody uses and nobody has asked for the longest is removed when the folder grows too large. A worker
reads its files again whenever it needs them, so it holds a lock on each until its process ends, however it
ends. A lock on the folder lets one process at a time look and change.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 16 * 2**30
SUFFIX, PART = ".safetensors", ".part"


class AdapterCache:
    """One worker's view of the folder; OSError where the folder cannot be used."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._held: dict[str, int] = {}
        """By checksum, the open descriptor of a file in use, which has the lock; never closed."""

    def find(self, checksum: str) -> Path | None:
        """The file, which stays as long as this process; None if the folder has none that is whole."""
        with self._alone():
            return self._found(checksum)

    def keep(self, checksum: str, content: bytes) -> Path:
        """As `find`, for a file that is put there if it is missing; it may push out others."""
        with self._alone():
            found = self._found(checksum)
            if found is not None:
                return found
            self._make_room(len(content))
            file = self._path(checksum)
            part = file.with_suffix(PART)
            try:
                part.write_bytes(content)
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
            self._hold(checksum)
            return file

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _path(self, checksum: str) -> Path:
        return self._folder / f"{checksum}{SUFFIX}"

    def _found(self, checksum: str) -> Path | None:
        file = self._path(checksum)
        if not file.is_file():
            return None
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != checksum:
                return None
        os.utime(file)
        self._hold(checksum)
        return file

    def _hold(self, checksum: str) -> None:
        if checksum in self._held:
            os.close(self._held.pop(checksum))  # it may be of a file that was damaged and replaced
        self._held[checksum] = os.open(self._path(checksum), os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._held[checksum], fcntl.LOCK_SH)

    def _make_room(self, num_bytes: int) -> None:
        """Removes files that nobody uses until `num_bytes` more fit; those in use stay, fit or not."""
        for left in self._folder.glob(f"*{PART}"):  # of a process that was killed
            left.unlink()
        known = {file: file.stat() for file in self._folder.glob(f"*{SUFFIX}")}
        size = sum(stat.st_size for stat in known.values())
        for file in sorted(known, key=lambda file: known[file].st_mtime_ns):
            if size + num_bytes <= self._max_bytes:
                return
            if not _in_use(file):
                file.unlink()
                size -= known[file].st_size


def _in_use(file: Path) -> bool:
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
