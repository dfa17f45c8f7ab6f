"""One migrated database for all tests of the contract, emptied before each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import Engine

import jobs.database
from jobs.batches import Batches
from jobs.database import Database
from jobs.store import Store
from kit.contract import Tables, Worker
from kit.databases import temporary_database


@pytest.fixture(scope="session")
def contract_url(servers: Any, database_template: str) -> Iterator[str]:
    """A database of these tests alone."""
    with temporary_database(servers.database_url, database_template) as url:
        yield url


@pytest.fixture(scope="session")
def shared_database(contract_url: str) -> Iterator[Database]:
    """Its pools."""
    with closing(Database(contract_url)) as database:
        yield database


@pytest.fixture(scope="session")
def shared_tables(contract_url: str) -> Iterator[Tables]:
    """Its rows."""
    with closing(Tables(contract_url)) as tables:
        yield tables


@pytest.fixture
def tables(shared_tables: Tables) -> Tables:
    """The rows of this test."""
    shared_tables.empty()
    return shared_tables


@pytest.fixture
def database(shared_database: Database, tables: Tables) -> Database:
    """Empty tables."""
    return shared_database


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


@pytest.fixture
def batches(database: Database) -> Batches:
    return Batches(database)


@pytest.fixture
def worker(database: Database) -> Worker:
    """A live one."""
    return Worker.hire(database)


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every try of a transaction: one more than asked for means that one failed and was tried again."""
    tries: list[object] = []

    def counted(once: Callable[..., object]) -> Callable[..., object]:
        def count(engine: Engine, work: object, *tenant: object) -> object:
            tries.append(work)
            return once(engine, work, *tenant)

        return count

    for kind in ("_transaction", "_single"):
        monkeypatch.setattr(jobs.database, kind, counted(getattr(jobs.database, kind)))
    return tries
