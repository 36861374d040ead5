"""Remembers which pictures are in object storage, so that the storage need not be asked for a list."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "objects",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False),
    )
    op.create_index("objects_by_age", "objects", ["created"])
