"""Lets the servers on one Postgres database know which pictures wait on the disk of one of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "held",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("created", sa.Float, nullable=False),
    )
