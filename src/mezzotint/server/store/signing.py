"""The secret of a data folder, and what it signs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from mezzotint.errors import ConfigError
from mezzotint.server.store.durable import sync

FILE = "signing-key"
MIN_BYTES = 32


class Signer:
    """Signs picture URLs, and proves that a server runs on the data folder with this secret."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret

    def signature(self, name: str, expires: int) -> str:
        """The signature (hex) of a picture's name and of its URL's end in seconds since 1970."""
        return self._sign(f"{name}\n{expires}")

    def proof(self, challenge: str) -> str:
        """The answer (hex) to a challenge.

        It is no picture's signature, whatever the challenge: those begin with a name of 32 characters.
        """
        return self._sign(f"proof\n{challenge}")

    def owner(self, key_id: str) -> str:
        """What the names of a key's pictures begin with: 8 characters that tell nothing of the key."""
        digest = bytes.fromhex(self._sign(f"owner\n{key_id}"))
        return base64.urlsafe_b64encode(digest[:6]).decode()

    def gateway_token(self) -> str:
        """What the servers on one database show each other."""
        return self._sign("gateway")

    def _sign(self, text: str) -> str:
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()


def load_signer(data_dir: Path) -> Signer:
    """The signer of a data folder; its secret is made on first use and outlives restarts, so URLs do too."""
    file = data_dir / FILE
    with contextlib.suppress(FileNotFoundError):
        secret = file.read_bytes()
        if len(secret) >= MIN_BYTES:
            return Signer(secret)
        raise ConfigError(
            f"{FILE} in data_dir is damaged ({len(secret)} bytes); delete it to have a new one made"
        )
    secret = secrets.token_bytes(MIN_BYTES)
    temporary = file.with_name(f".{FILE}-{secrets.token_hex(4)}")
    temporary.touch(mode=0o600)
    temporary.write_bytes(secret)
    sync(temporary)
    try:
        os.link(temporary, file)  # fails where another process was first, and then its secret counts
    except FileExistsError:
        return Signer(file.read_bytes())
    finally:
        temporary.unlink()
    sync(data_dir)
    return Signer(secret)
