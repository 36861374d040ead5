"""Files that are promised: on the disk before anybody is told of them, in a folder that one server owns."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import structlog

from mezzotint.errors import ConfigError

LOCK = "lock"

log = structlog.get_logger(__name__)


def sync(path: Path) -> None:
    """Has the disk keep a file's content, or a folder's list of names (blocking)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def owned(data_dir: Path, *, shared: bool) -> Iterator[None]:
    """No other server has this data folder while the block runs; ConfigError if one has it already.

    With `shared`, others that share it may. The lock ends with the process, however that ends.
    """
    descriptor = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"data_dir: another server uses {data_dir}; stop it, or give this one another --data-dir"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning(
                "the data folder cannot be locked; start no second server on it", error=error.strerror
            )
        yield
    finally:
        os.close(descriptor)
