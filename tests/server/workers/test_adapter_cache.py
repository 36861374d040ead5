"""A node's adapter files: bounded, the least recently wanted first, and never one that a worker uses."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mezzotint.server.workers.adapter_cache import AdapterCache

USER = """
import sys, signal
from pathlib import Path
from mezzotint.server.workers.adapter_cache import AdapterCache
assert AdapterCache(Path(sys.argv[1])).find(sys.argv[2])
print("held", flush=True)
signal.pause()
"""


def content(letter: str) -> bytes:
    return letter.encode() * 100


def checksum(letter: str) -> str:
    return hashlib.sha256(content(letter)).hexdigest()


def put(folder: Path, letter: str, max_bytes: int = 250) -> Path:
    """Keeps a file for a worker that is gone at once."""
    cache = AdapterCache(folder, max_bytes)
    file = cache.keep(checksum(letter), content(letter))
    for descriptor in cache._held.values():  # as the end of its process would
        os.close(descriptor)
    return file


def letters(folder: Path) -> str:
    return "".join(sorted(file.read_text()[0] for file in folder.glob("*.safetensors")))


def age(file: Path, seconds: int) -> None:
    os.utime(file, (1_000_000_000 - seconds, 1_000_000_000 - seconds))


def test_a_file_is_kept_once_and_found_by_its_bytes(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path / "new" / "adapters")
    assert cache.find(checksum("a")) is None
    file = cache.keep(checksum("a"), content("a"))
    assert file.read_bytes() == content("a")
    inode = file.stat().st_ino
    assert cache.keep(checksum("a"), content("a")).stat().st_ino == inode
    assert cache.find(checksum("a")) == file


def test_a_damaged_file_is_not_found_and_is_replaced(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path)
    file = cache.keep(checksum("a"), content("a"))
    file.write_bytes(b"half")
    assert cache.find(checksum("a")) is None
    assert cache.keep(checksum("a"), content("a")).read_bytes() == content("a")


def test_what_was_wanted_the_longest_ago_goes_first(tmp_path: Path) -> None:
    age(put(tmp_path, "a"), 10)
    age(put(tmp_path, "b"), 20)
    put(tmp_path, "c")
    assert letters(tmp_path) == "ac"
    age(tmp_path / f"{checksum('c')}.safetensors", 5)
    for letter in "ad":  # being found makes a file recent
        put(tmp_path, letter)
    assert letters(tmp_path) == "ad"


def test_a_file_in_use_stays_until_its_workers_process_is_gone(tmp_path: Path) -> None:
    age(put(tmp_path, "a"), 20)
    age(put(tmp_path, "b"), 10)
    worker = subprocess.Popen(
        [sys.executable, "-c", USER, str(tmp_path), checksum("a")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "held\n"
        age(tmp_path / f"{checksum('a')}.safetensors", 20)
        put(tmp_path, "c")
        assert letters(tmp_path) == "ac", "the older one is in use"
        put(tmp_path, "d", max_bytes=150)
        assert letters(tmp_path) == "ad", "what is in use stays though it does not fit"
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert worker.stdout is not None
        worker.stdout.close()
    put(tmp_path, "e", max_bytes=150)
    assert letters(tmp_path) == "e"


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"{checksum('a')}.part"
    left.write_bytes(b"half")
    put(tmp_path, "b")
    assert not left.exists()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        AdapterCache(tmp_path / "file" / "adapters").find(checksum("a"))
