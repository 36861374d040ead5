"""Alembic runs this module for each command; the transaction belongs to the caller."""

from __future__ import annotations

from alembic import context

from mezzotint.server.store.database import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite cannot change a column: the table is copied
)
with context.begin_transaction():
    context.run_migrations()
