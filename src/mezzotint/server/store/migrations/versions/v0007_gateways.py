"""Lets the servers on one Postgres database find each other, and each other's requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "gateways",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("url", sa.String, nullable=False),
        sa.Column("heartbeat", sa.Float, nullable=False),
        sa.Column("started", sa.Float, nullable=False),
    )
    op.create_table(
        "requests",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("key_id", sa.String, nullable=False),
        sa.Column("idempotency_key", sa.String),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("headers", sa.JSON, nullable=False),
        sa.Column("body", sa.LargeBinary),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
        sa.UniqueConstraint("key_id", "idempotency_key"),
    )
    op.create_index("requests_of_owner", "requests", ["owner"])
