"""Writes down the last command to each endpoint, so that every server on the database carries it out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("endpoints", sa.Column("command", sa.String))
    op.add_column("endpoints", sa.Column("commands", sa.Integer, nullable=False, server_default="0"))
