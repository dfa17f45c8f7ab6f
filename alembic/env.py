"""Runs the migrations on the connection that `headrace.migrations` hands in, or on HEADRACE_DATABASE_URL."""

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text

from jobs.settings import Settings
from jobs.tables import metadata


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, compare_server_default=True)
    with context.begin_transaction():
        # Two stacks may start at once: one migrates, the other waits and finds nothing left to do.
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('headrace.migrations'))"))
        context.run_migrations()


def configured_url() -> str:
    url = Settings.load().database_url
    if url is None:
        raise SystemExit("HEADRACE_DATABASE_URL: is not set; `headrace migrate` knows the embedded server's")
    return url


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    with create_engine(configured_url(), poolclass=pool.NullPool).connect() as own:
        migrate(own)
