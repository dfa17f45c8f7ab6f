"""The migrations, against the tables that the code believes in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, pool

from headrace.migrations import downgrade, upgrade
from jobs.tables import metadata
from kit.contract import Tables
from kit.databases import connect, temporary_database
from kit.threads import all_at_once

REPOSITORY = Path(__file__).parents[3]
UPGRADE = "import os; from headrace.migrations import upgrade; upgrade(os.environ['URL'])"

CATALOGUES = {
    "columns": """
        SELECT table_name, column_name, data_type, is_nullable, column_default, numeric_precision, numeric_scale
        FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version'
    """,
    "constraints": """
        SELECT conrelid::regclass::text AS table, conname, pg_get_constraintdef(oid) AS definition
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'
    """,
    "indexes": """
        SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'
    """,
}


@pytest.fixture
def bare_url(servers: Any) -> Iterator[str]:
    """A database without a table."""
    with temporary_database(servers.database_url) as url:
        yield url


@pytest.fixture(scope="module")
def created_url(servers: Any) -> Iterator[str]:
    """A database whose tables were made from the code, without a migration."""
    with temporary_database(servers.database_url) as url:
        engine = create_engine(url, poolclass=pool.NullPool)
        metadata.create_all(engine)
        yield url


def table_names(url: str) -> set[str]:
    with connect(url) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    return {name for (name,) in rows}


def catalogue(url: str, query: str) -> set[tuple[Any, ...]]:
    with closing(Tables(url)) as tables:
        return {tuple(row.values()) for row in tables.rows(query)}


def test_alembic_finds_no_difference(contract_url: str) -> None:
    """Alembic's own comparison, types and defaults too, has no change to propose."""
    with create_engine(contract_url, poolclass=pool.NullPool).connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True, "target_metadata": metadata}
        )
        assert compare_metadata(context, metadata) == []


@pytest.mark.parametrize("name", CATALOGUES)
def test_same_tables_as_the_code_makes(name: str, contract_url: str, created_url: str) -> None:
    """Migrated or made from the code: the same columns, constraints and indexes, to the letter of their definition."""
    assert catalogue(contract_url, CATALOGUES[name]) == catalogue(created_url, CATALOGUES[name])


def test_up_down_and_up_again(bare_url: str) -> None:
    """From empty to the newest version, back to nothing, and up again, as often as one likes."""
    ours = set(metadata.tables)
    upgrade(bare_url)
    assert table_names(bare_url) == ours | {"alembic_version"}
    downgrade(bare_url, "base")
    assert table_names(bare_url) == {"alembic_version"}
    upgrade(bare_url)
    upgrade(bare_url)
    assert table_names(bare_url) == ours | {"alembic_version"}


def test_down_leaves_nothing_behind(bare_url: str) -> None:
    """After the way down no index, constraint, type, function or version is left."""
    upgrade(bare_url)
    downgrade(bare_url, "base")
    with closing(Tables(bare_url)) as tables:
        assert tables.count("alembic_version") == 0
        left = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname NOT LIKE %s"
        assert tables.rows(left, "alembic_version%") == []
        assert tables.rows("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace") == []


def test_two_upgrades_at_once(bare_url: str) -> None:
    """Two stacks that start together both come up: one migrates, the other waits and finds it done."""
    environment = os.environ | {"URL": bare_url, "PYTHONPATH": str(REPOSITORY)}

    def migrate() -> int:
        return subprocess.run([sys.executable, "-c", UPGRADE], env=environment, timeout=120, check=False).returncode

    assert all_at_once([migrate, migrate]) == [0, 0]
    assert table_names(bare_url) >= set(metadata.tables)
