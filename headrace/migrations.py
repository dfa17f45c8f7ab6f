"""Brings a database to the newest schema. The migrations lie in `alembic/` in a clone and travel in the wheel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, pool

_HERE = Path(__file__).resolve().parent


def folder() -> Path:
    """Where `env.py` and `versions/` are."""
    bundled = _HERE / "bundled" / "alembic"
    return bundled if bundled.is_dir() else _HERE.parent / "alembic"


def upgrade(database_url: str, revision: str = "head") -> None:
    """Migrate up to `revision`. Processes that do so at once take turns."""
    _run(database_url, lambda config: command.upgrade(config, revision))


def downgrade(database_url: str, revision: str) -> None:
    """Migrate down to `revision`; `base` drops every table."""
    _run(database_url, lambda config: command.downgrade(config, revision))


def versions(database_url: str) -> tuple[str | None, str]:
    """The version that the database is at, None if it never was migrated, and the newest one."""
    found: list[str | None] = []

    def look(config: Config) -> None:
        found.append(MigrationContext.configure(config.attributes["connection"]).get_current_revision())
        found.append(ScriptDirectory.from_config(config).get_current_head())

    _run(database_url, look)
    current, newest = found
    assert newest is not None
    return current, newest


def _run(database_url: str, work: Callable[[Config], None]) -> None:
    engine = create_engine(database_url, poolclass=pool.NullPool)
    config = Config()
    config.set_main_option("script_location", str(folder()).replace("%", "%%"))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        work(config)
