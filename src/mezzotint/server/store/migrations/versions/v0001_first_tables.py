"""The tables of version 0.1.0."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    meta = op.create_table(
        "meta", sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.String)
    )
    op.bulk_insert(meta, [{"name": "schema_version", "value": "1"}])
    op.create_table(
        "keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("admin", sa.Boolean, nullable=False),
        sa.Column("endpoints", sa.JSON, nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("revoked", sa.Float),
    )
    op.create_table(
        "endpoints",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("desired", sa.String, nullable=False),
        sa.Column("from_file", sa.JSON),
        sa.Column("calibration", sa.JSON),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
    )
    op.create_table(
        "endpoint_versions",
        sa.Column("endpoint_id", sa.String, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("comment", sa.String, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("created_by", sa.String, nullable=False),
    )
    op.create_table(
        "adapters",
        sa.Column("endpoint_id", sa.String, primary_key=True),
        sa.Column("route", sa.String, primary_key=True),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("scale", sa.Float, nullable=False),
        sa.Column("checksum", sa.String, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "pictures",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("key_id", sa.String, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("parameters", sa.JSON, nullable=False),
    )
    op.create_index("pictures_of_key", "pictures", ["key_id", "created"])
    op.create_table(
        "usage",
        sa.Column("key_id", sa.String, primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("step_seconds", sa.Float, nullable=False),
        sa.Column("images", sa.Integer, nullable=False),
    )
