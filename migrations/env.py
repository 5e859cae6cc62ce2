"""Alembic's environment, run by registry.wiring.migrate with a connection in its attributes; it reads no configuration file and no environment."""

from __future__ import annotations

from alembic import context

from registry.tables import metadata


def run() -> None:
    """Brings the schema of the given connection to the requested revision, in one transaction."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


run()
