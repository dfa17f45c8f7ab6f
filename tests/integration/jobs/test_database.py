"""Connections on which nobody answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest
from sqlalchemy import text

from jobs.database import Database
from jobs.errors import StoreUnavailable
from kit.proxy import Proxy

ONE = text("SELECT 1")
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
