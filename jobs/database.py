"""Connections to Postgres: pools, timeouts against silent peers, and bounded retries of what is transient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import orjson
import psycopg
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from jobs.errors import StoreUnavailable

T = TypeVar("T")

# A COPY goes past SQLAlchemy, and so do its errors.
TRANSIENT = (
    OperationalError,
    InterfaceError,
    PoolTimeoutError,
    psycopg.OperationalError,
    psycopg.InterfaceError,
)

_CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": 3,
    # A peer that answers nothing any more is given up after about 10 s, sent or idle.
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
_SESSION = "-c idle_in_transaction_session_timeout=15s -c statement_timeout=60s -c timezone=UTC"


class Database:
    """Two small pools on one Postgres: `durable` commits wait for the disk, `relaxed` ones do not.

    Relaxed commits are for what a crash of Postgres may undo harmlessly: claims (the token guards them), leases and
    bookkeeping of messages.
    """

    def __init__(self, url: str, wait_seconds: float = 10.0, pool_size: int = 8) -> None:
        self.url = url
        self.wait_seconds = wait_seconds
        self._durable = _engine(url, _SESSION, wait_seconds, pool_size)
        self._relaxed = _engine(url, f"{_SESSION} -c synchronous_commit=off", wait_seconds, pool_size)

    def run(self, work: Callable[[Connection], T], *, relaxed: bool = False, single: bool = False) -> T:
        """Run `work` in a transaction (`single`: as one statement that is its own); again if the failure is transient.

        `work` may run more than once and must bear it. Raises StoreUnavailable after `wait_seconds`.
        """
        engine = self._relaxed if relaxed else self._durable
        attempt = _statement if single else _transaction
        retrying = Retrying(
            retry=retry_if_exception_type(TRANSIENT),
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            stop=stop_after_delay(self.wait_seconds),
            reraise=True,
        )
        try:
            result: T = retrying(attempt, engine, work)
        except TRANSIENT as error:
            message = f"Postgres did not answer within {self.wait_seconds:g} s: {_brief(error)}"
            raise StoreUnavailable(message) from error
        return result

    def close(self) -> None:
        """Close every idle connection."""
        self._durable.dispose()
        self._relaxed.dispose()


def _engine(url: str, session: str, wait_seconds: float, pool_size: int) -> Engine:
    return create_engine(
        url,
        connect_args=_CONNECT_ARGS | {"options": session},
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=wait_seconds,
        pool_use_lifo=True,
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
    )


def _transaction(engine: Engine, work: Callable[[Connection], T]) -> T:
    with engine.begin() as connection:
        return work(connection)


def _statement(engine: Engine, work: Callable[[Connection], T]) -> T:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        return work(connection)


def _brief(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
