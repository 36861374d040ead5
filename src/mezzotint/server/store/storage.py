"""Pictures as files, reached through signed URLs that expire.

A name is random and tells nothing; the signature covers name and expiry, so knowing a name is not enough.
Files are written under another name and then renamed, so that a reader sees all of a picture or none of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import re
import secrets
import time
from pathlib import Path

from mezzotint.errors import ConfigError, GoneError, NotFoundError, PermissionDeniedError, StorageFullError

PATH = "/images/"
"""Where pictures stand below the server's own address."""
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
_NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpg)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def load_secret(data_dir: Path) -> bytes:
    """The key that signs URLs; made on first use, and kept so that URLs outlive restarts."""
    file = data_dir / "signing-key"
    with contextlib.suppress(FileNotFoundError):
        secret = file.read_bytes()
        if len(secret) >= 32:
            return secret
        raise ConfigError(
            f"{file.name} in data_dir is damaged ({len(secret)} bytes); delete it to have a new one made"
        )
    secret = secrets.token_bytes(32)
    temporary = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    temporary.touch(mode=0o600)
    temporary.write_bytes(secret)
    try:
        os.link(temporary, file)  # fails where another process was first, and then its secret counts
    except FileExistsError:
        return file.read_bytes()
    finally:
        temporary.unlink()
    return secret


def proof(secret: bytes, challenge: str) -> str:
    """What only a server on the data folder with this secret can answer to a challenge.

    It signs no picture's URL, whatever the challenge: those begin with a name of 32 characters.
    """
    return hmac.new(secret, f"proof\n{challenge}".encode(), hashlib.sha256).hexdigest()


class Storage:
    """The folder of pictures. Its methods touch the disk: call them from a thread."""

    def __init__(self, folder: Path, secret: bytes, ttl_s: float) -> None:
        self.folder = folder
        self.ttl_s = ttl_s
        self.secret = secret
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def save(self, data: bytes, suffix: str = ".png") -> str:
        """Stores a picture and answers its name; StorageFullError leaves nothing behind."""
        name = secrets.token_urlsafe(24) + suffix
        temporary = self.folder / f"{name}.part"
        try:
            temporary.write_bytes(data)
            temporary.replace(self.folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if error.errno in _FULL:
                raise StorageFullError(
                    "the server's disk is full, so the picture could not be stored; "
                    "ask for response_format png to have it in the answer, or free space in data_dir"
                ) from None
            raise
        return name

    def url(self, base: str, name: str, *, expires: int | None = None) -> str:
        """The address of a stored picture below `base`, valid for `ttl_s` seconds from now."""
        until = int(time.time() + self.ttl_s) if expires is None else expires
        return f"{base.rstrip('/')}{PATH}{name}?expires={until}&signature={self._sign(name, until)}"

    def read(self, name: str, expires: str, signature: str) -> tuple[bytes, str]:
        """The picture behind a URL and its media type.

        403 for a forged one, 410 for an expired one, 404 for what never was.
        """
        if not _NAME.fullmatch(name) or not expires.isascii() or not expires.isdigit() or len(expires) > 12:
            raise NotFoundError("there is no such picture; take the URL from an answer as it is")
        expected = self._sign(name, int(expires))
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise PermissionDeniedError(
                "the signature of this picture URL is not valid; take the URL from an answer as it is",
                code="invalid_signature",
            )
        with contextlib.suppress(FileNotFoundError):  # cleaning may remove it at any moment
            if time.time() < int(expires):
                file = self.folder / name
                return file.read_bytes(), MEDIA_TYPES[file.suffix]
        raise GoneError(
            "this picture URL has expired; the same request with the same seed makes the picture again"
        )

    def clean(self, kept: frozenset[str] = frozenset()) -> tuple[int, int]:
        """Removes files past their life, but for `kept`; answers how many went and how many bytes stay."""
        gone, left = 0, 0
        now = time.time()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    if facts.st_mtime + self.ttl_s < now and entry.name not in kept:
                        os.unlink(entry.path)
                        gone += 1
                    else:
                        left += facts.st_size
        return gone, left

    def _sign(self, name: str, expires: int) -> str:
        return hmac.new(self.secret, f"{name}\n{expires}".encode(), hashlib.sha256).hexdigest()
