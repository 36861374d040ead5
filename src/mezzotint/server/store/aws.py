"""From the settings and the environment to a client of an S3-compatible store."""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from obstore.store import S3Store

from mezzotint.errors import ConfigError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Credential

CONNECT_TIMEOUT_S = 3.0
REREAD_S = 60.0
"""How often the file of credentials is read again, so that new ones take effect."""
_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(?:/(?P<prefix>[A-Za-z0-9._/-]*))?")


@dataclass(frozen=True, slots=True)
class CredentialsFile:
    """One profile of the file that AWS's own programs read. Called, it gives what the file holds now."""

    path: Path
    profile: str

    def __call__(self) -> S3Credential:
        parser = configparser.RawConfigParser()
        try:
            with self.path.open(encoding="utf-8") as file:
                parser.read_file(file)
            section = parser[self.profile]
            return {
                "access_key_id": section["aws_access_key_id"],
                "secret_access_key": section["aws_secret_access_key"],
                "token": section.get("aws_session_token"),
                "expires_at": datetime.now(UTC) + timedelta(seconds=REREAD_S),
            }
        except (OSError, ValueError, KeyError, configparser.Error) as error:
            # Not the error's own words, which may repeat a line of the file.
            raise ConfigError(
                f"the AWS credentials file has no usable profile {self.profile!r} ({type(error).__name__}); "
                "it needs aws_access_key_id and aws_secret_access_key"
            ) from None


def open_bucket(
    url: str, endpoint: str | None, timeout_s: float, environment: Mapping[str, str] | None = None
) -> S3Store:
    """The bucket and prefix of `url`, with the credentials that AWS's own programs would find.

    `endpoint` is the address of a store that is not AWS's. Nothing is asked of the store yet. ConfigError
    says what is wrong with the settings, without repeating a secret.
    """
    environment = os.environ if environment is None else environment
    match = _URL.fullmatch(url)
    if match is None:
        raise ConfigError(
            "storage must be s3://BUCKET or s3://BUCKET/PREFIX, without credentials; those come from the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or from a credentials file"
        )
    found = endpoint or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    config: S3Config = {"endpoint": found.rstrip("/")} if found else {}
    client: ClientConfig = {
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=min(timeout_s, CONNECT_TIMEOUT_S)),
        "allow_http": (found or "").startswith("http://"),
    }
    retry: RetryConfig = {"max_retries": 1, "retry_timeout": timedelta(seconds=timeout_s)}
    return S3Store(
        match["bucket"],
        prefix=(match["prefix"] or "").strip("/") or None,
        config=config,
        client_options=client,
        retry_config=retry,
        credential_provider=_credentials_file(environment),
    )


def _credentials_file(environment: Mapping[str, str]) -> CredentialsFile | None:
    """The file to take credentials from; None where the environment or the machine has them itself."""
    if environment.get("AWS_ACCESS_KEY_ID") or environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return None
    named = environment.get("AWS_SHARED_CREDENTIALS_FILE")
    path = Path(named) if named else Path.home() / ".aws" / "credentials"
    profile = environment.get("AWS_PROFILE")
    if not (named or profile or path.is_file()):
        return None
    file = CredentialsFile(path, profile or "default")
    file()  # for its errors
    return file
