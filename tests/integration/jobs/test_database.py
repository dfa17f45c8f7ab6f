"""Connections on which nobody answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest
from sqlalchemy import event, make_url, text

from jobs.database import Database, Execute
from jobs.errors import StoreUnavailable
from kit.proxy import Proxy
from kit.waiting import wait_until

ONE = text("SELECT 1")
DIE = text("SELECT pg_terminate_backend(pg_backend_pid())")
# One on each pool.
ASK: dict[str, Callable[[Database], object]] = {
    "transaction": lambda database: database.run(lambda connection: connection.execute(ONE).scalar()),
    "single": lambda database: database.rows(ONE),
    "relaxed": lambda database: database.rows(ONE, relaxed=True),
}


@pytest.mark.parametrize("first", ASK)
def test_connections_that_fell_silent_together_cost_one_wait(contract_url: str, first: str) -> None:
    """Who asks on one of them finds out for all: with no patience left, nobody else fails."""
    with (
        Proxy.before(contract_url) as proxy,
        closing(Database(proxy.url(contract_url), wait_seconds=0.0, answer_seconds=1.0)) as database,
    ):
        for ask in ASK.values():
            ask(database)
        proxy.silence(new_too=False)
        with pytest.raises(StoreUnavailable, match="no answer"):
            ASK[first](database)
        for ask in ASK.values():
            ask(database)


def test_a_lost_connection_leaves_no_other_behind(contract_url: str) -> None:
    """One that was in use meanwhile is not used again, nor does it stay open beside its successor."""
    named = make_url(contract_url).update_query_dict({"application_name": "loser"}).render_as_string(False)
    with closing(Database(named, wait_seconds=0.0)) as database, closing(Database(contract_url)) as observer:

        def lose_another(execute: Execute) -> None:
            execute(ONE, {})
            with pytest.raises(StoreUnavailable):
                database.rows(DIE)

        for _ in range(5):
            database.single(lose_another)
        sessions = text("SELECT 1 FROM pg_stat_activity WHERE application_name = 'loser'")
        wait_until(lambda: len(observer.rows(sessions)) <= 1, 10.0, "one connection, the last one in use")


def test_a_connection_that_is_opened_while_another_is_lost_is_used(contract_url: str) -> None:
    """However often that happens."""
    with closing(Database(contract_url, wait_seconds=0.0)) as database:

        def lose_another(*_: object) -> None:
            with pytest.raises(StoreUnavailable):
                database.rows(DIE, relaxed=True)

        event.listen(database._single, "connect", lose_another)
        assert len(database.rows(ONE)) == 1


def test_postgres_notices_that_a_machine_is_gone(contract_url: str) -> None:
    """Within seconds, not the two hours of its kernel, and its sessions make room for others."""
    with closing(Database(contract_url)) as database:
        for name, value in {"idle": "5", "interval": "2", "count": "3"}.items():
            [row] = database.rows(text(f"SELECT current_setting('tcp_keepalives_{name}') AS value"))
            assert row.value == value
