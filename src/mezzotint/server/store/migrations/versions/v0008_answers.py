"""Keeps small answers, so that another server finds them when the one that made them has died."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("requests", sa.Column("answer", sa.LargeBinary))
    op.add_column("requests", sa.Column("answer_facts", sa.JSON))
