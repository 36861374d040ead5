"""Pictures as files in a folder of this machine."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mezzotint.errors import StorageFullError
from mezzotint.server.store.durable import sync
from mezzotint.server.threads import FILES

OWNER_LENGTH = 8
"""Characters at the beginning of a name that `Signer.owner` gives; the other 24 are random."""
PIECE_BYTES = 2**18
"""Most bytes of a file that are read at once."""
PART = ".part"
"""The end of a name while the file is being written."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoredFile(Protocol):
    """A picture's file, wherever it is."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    @property
    def modified(self) -> float:
        """When it was written, in seconds since 1970."""

    def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes]:
        """Its bytes from `start` to before `stop`, a piece at a time."""


class Storage(Protocol):
    """Where pictures are. Methods that are no coroutines block: call them from a thread."""

    def write(self, name: str, data: bytes) -> None:
        """Stores a picture under a name that has never been used.

        A reader sees all of it or none. StorageFullError and UnavailableError leave nothing behind.
        """

    async def find(self, name: str) -> StoredFile | None:
        """The file of this name; UnavailableError when nobody can tell."""

    def remove(self, name: str) -> int:
        """Removes a file, if there is one of this name; returns how many bytes that freed."""

    def require_room(self) -> None:
        """UnavailableError while nothing can be stored, for all that is known."""

    def is_shared(self) -> bool:
        """Whether other servers find here, at this moment, all that this one has stored."""

    def write_held(self) -> int:
        """Writes pictures that wait elsewhere to where they belong; returns how many."""

    def clean(self, before: float, listed: frozenset[str]) -> tuple[int, Counter[str]]:
        """Removes what was written before this time and is not `listed`.

        Returns how many files went and how many bytes of each owner stay.
        """


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A file of this machine, as it was when it was found."""

    path: Path
    size: int
    modified: float

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes]:
        file = await FILES.run(self.path.open, "rb")
        try:
            while start < stop:
                size = min(PIECE_BYTES, stop - start)
                yield await FILES.run(os.pread, file.fileno(), size, start)
                start += size
        finally:
            file.close()


class Folder:
    """The files of a folder, which must exist."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, data: bytes) -> None:
        """Writes under another name first, so that a reader sees all of a picture or none of it."""
        temporary = self.path / (name + PART)
        try:
            temporary.write_bytes(data)
            sync(temporary)
            temporary.replace(self.path / name)
            sync(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if error.errno in _DISK_FULL:
                raise StorageFullError(
                    "the server's disk is full, so the picture could not be stored; "
                    "ask for response_format png to have it in the answer, or free space in data_dir"
                ) from None
            raise

    async def find(self, name: str) -> FolderFile | None:
        return await FILES.run(self.stat, name)

    def stat(self, name: str) -> FolderFile | None:
        """The file of this name (blocking)."""
        path = self.path / name
        with contextlib.suppress(FileNotFoundError):  # cleaning may remove it at any moment
            found = path.stat()
            return FolderFile(path, found.st_size, found.st_mtime)
        return None

    def files(self) -> list[FolderFile]:
        """The whole pictures here, the oldest first (blocking)."""
        found = [self.stat(path.name) for path in self.path.iterdir() if path.suffix != PART]
        return sorted((file for file in found if file), key=lambda file: file.modified)

    def remove(self, name: str) -> int:
        found = self.stat(name)
        if found is None:
            return 0
        found.path.unlink(missing_ok=True)
        return found.size

    def require_room(self) -> None:
        """A full disk is noticed when it is written to."""

    def is_shared(self) -> bool:
        return False

    def write_held(self) -> int:
        return 0  # nothing ever waits

    def clean(self, before: float, listed: frozenset[str]) -> tuple[int, Counter[str]]:
        removed, used = 0, Counter[str]()
        with os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    if stat.st_mtime < before and entry.name not in listed:
                        os.unlink(entry.path)
                        removed += 1
                    else:
                        used[entry.name[:OWNER_LENGTH]] += stat.st_size
        return removed, used
