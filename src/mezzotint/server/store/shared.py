"""What the servers on one Postgres database have in common."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from mezzotint.errors import ConfigError
from mezzotint.server.store import database
from mezzotint.server.store.signing import MIN_BYTES, Signer

SIGNING = "signing"
"""Name of the row with the secret that signs."""
_TABLE = database.secrets


def share_signer(engine: sa.Engine, own: Signer) -> Signer:
    """The signer of all servers on this database; on SQLite, which has one server, it is `own`.

    The first server on a Postgres database gives it the secret of its data folder, so the URLs that this
    server has made stay good.
    """
    if engine.dialect.name == "sqlite":
        return own
    offer = postgresql.insert(_TABLE).values(name=SIGNING, value=own.secret.hex()).on_conflict_do_nothing()
    with engine.begin() as connection:
        connection.execute(offer)
        found = connection.scalar(sa.select(_TABLE.c.value).where(_TABLE.c.name == SIGNING))
    try:
        secret = bytes.fromhex(found or "")
    except ValueError:
        secret = b""
    if len(secret) < MIN_BYTES:
        raise ConfigError(
            f"database_url: the row {SIGNING} of the table secrets is damaged ({len(secret)} bytes, at least "
            f"{MIN_BYTES} are needed); delete it to have a new one made, which ends all picture URLs"
        )
    return Signer(secret)
