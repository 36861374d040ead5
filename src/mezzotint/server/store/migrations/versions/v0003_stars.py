"""Pictures can be starred; those of earlier versions are not."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("pictures", sa.Column("starred", sa.Boolean, nullable=False, server_default=sa.false()))
