"""Connections to Postgres: pools, timeouts against silent peers, and bounded retries of what is transient.

A connection whose user is held to row security (the gateway's, see `jobs.access`) says before its statements for which
tenant it acts, and proves it. Every other one is trusted, and says nothing.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Self, TypeAlias, TypeVar

import orjson
import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import namedtuple_row
from sqlalchemy import Connection, Dialect, Engine, PoolProxiedConnection, TextClause, create_engine, event, text
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from jobs.errors import StoreUnavailable
from jobs.signing import Signer

T = TypeVar("T")
Fields: TypeAlias = Mapping[str, Any]
Execute: TypeAlias = Callable[[TextClause, Fields], list[Any]]

# What goes past SQLAlchemy, a COPY and every single statement, raises the driver's errors.
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
# A server that takes what it is sent and answers nothing is no fault that TCP can see. Longer than any statement that a
# client of ours needs; a worker, whose rows wait for it, is less patient.
_ANSWER_SECONDS = 30.0
# The locks of a client that vanished in a transaction are held for as long.
_IDLE_SECONDS = 10.0
# As patient as we are: the sessions of a machine that is gone would count against the server's maximum for two hours.
_SESSION = (
    "-c statement_timeout=60s -c timezone=UTC"
    " -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 -c tcp_keepalives_count=3"
)
_RELAXED = "synchronous_commit=off"
_RELAX = text(f"SET LOCAL {_RELAXED}")

# What is known of a connection.
_HELD = "held to row security"
_ACTS_FOR = "acts for"
_IS_HELD = "SELECT row_security_active(oid) FROM pg_class WHERE oid = to_regclass('jobs')"
_SAY_WHO = "SELECT set_config('headrace.tenant', %s, %s), set_config('headrace.proof', %s, %s)"


@dataclass(frozen=True, slots=True)
class _Tenant:
    """For whom statements are, and the proof that one of us says so."""

    id: str = ""
    proof: str = ""


_NOBODY = _Tenant()


class Database:
    """Three small pools on one Postgres: for transactions, for single statements, and for `relaxed` ones.

    A connection on which no answer comes within `answer_seconds` is given up, and that is a transient failure. None
    that stood before is used again: each would cost that wait anew. Postgres gives a client up that is silent for
    `idle_seconds` in a transaction.

    Relaxed commits do not wait for the disk. They are for what a crash of Postgres may undo harmlessly: claims (the
    token guards them), leases and bookkeeping of messages.
    """

    def __init__(
        self,
        url: str,
        wait_seconds: float = 10.0,
        pool_size: int = 8,
        *,
        signer: Signer | None = None,
        answer_seconds: float = _ANSWER_SECONDS,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        """`signer` proves for which tenant a statement is, to a Postgres that asks."""
        self.url = url
        self._signer = signer
        self._tenant = _NOBODY
        self.wait_seconds = wait_seconds
        make = partial(
            _engine, url, wait_seconds=wait_seconds, pool_size=pool_size, peer=_Peer(answer_seconds=answer_seconds)
        )
        session = f"{_SESSION} -c idle_in_transaction_session_timeout={1000 * idle_seconds:.0f}"
        self._durable = make(session)
        self._single = make(session, autocommit=True)
        self._relaxed = make(f"{session} -c {_RELAXED}", autocommit=True)

    def as_tenant(self, tenant_id: str) -> Self:
        """The same connections, on behalf of this tenant alone."""
        other = copy.copy(self)
        if self._signer is not None:
            other._tenant = _Tenant(tenant_id, self._signer.sign(tenant_id))  # noqa: SLF001 - our own kind
        return other

    def run(self, work: Callable[[Connection], T], *, relaxed: bool = False) -> T:
        """Run `work` in a transaction; again if the failure is transient. It may run more than once and must bear it.

        Raises StoreUnavailable after `wait_seconds`.
        """
        ready = _relaxed(work) if relaxed else work
        return self._steadily(lambda: _transaction(self._durable, ready, self._tenant))

    def single(self, work: Callable[[Execute], T], *, relaxed: bool = False) -> T:
        """As `run`, but each statement of `work` is a transaction of its own; it gives its rows as named tuples.

        Straight over the driver: measured, 0.12 ms for a statement that takes 0.32 ms through SQLAlchemy.
        """
        engine = self._relaxed if relaxed else self._single
        return self._steadily(lambda: _single(engine, work, self._tenant))

    def rows(self, statement: TextClause, fields: Fields | None = None, *, relaxed: bool = False) -> list[Any]:
        """The rows of one statement."""
        return self.single(lambda execute: execute(statement, fields or {}), relaxed=relaxed)

    def row(self, statement: TextClause, fields: Fields) -> Any:
        """Its first row; None if there is none."""
        return next(iter(self.rows(statement, fields)), None)

    def _steadily(self, work: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return work()
        except TRANSIENT as error:
            left = self.wait_seconds - (time.monotonic() - started)
            if left <= 0:
                raise self._unavailable(error) from error
        return self._again(work, left)

    def _again(self, work: Callable[[], T], left_seconds: float) -> T:
        retrying = Retrying(
            retry=retry_if_exception_type(TRANSIENT),
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            stop=stop_after_delay(left_seconds),
            reraise=True,
        )
        try:
            result: T = retrying(work)
        except TRANSIENT as error:
            raise self._unavailable(error) from error
        return result

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"Postgres did not answer within {self.wait_seconds:g} s: {_brief(error)}")

    def close(self) -> None:
        """Close every idle connection."""
        for engine in (self._durable, self._single, self._relaxed):
            engine.dispose()


@dataclass(slots=True)
class _Peer:
    """The server, as all pools see it."""

    answer_seconds: float = _ANSWER_SECONDS
    lost_at: float = -math.inf  # when a connection was last lost: with it, every one that is older


class _Connection(psycopg.Connection[Any]):
    """One that does not wait for ever."""

    peer = _Peer()
    opened_at = math.inf
    was_used = False

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """As psycopg's, but bounded; then it is closed, for its answer may still come."""
        try:
            return super().wait(gen, interval, timeout or self.peer.answer_seconds)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 - the public API has no such bound
            self.pgconn.finish()
            self.peer.lost_at = time.monotonic()
            raise psycopg.OperationalError(f"no answer within {self.peer.answer_seconds:g} s") from None


def _engine(
    url: str, session: str, *, wait_seconds: float, pool_size: int, peer: _Peer, autocommit: bool = False
) -> Engine:
    def connect(_dialect: Any, _record: Any, arguments: Sequence[Any], options: dict[str, Any]) -> _Connection:
        opened_at = time.monotonic()
        connection = _Connection.connect(*arguments, **options)
        connection.peer, connection.opened_at = peer, opened_at
        return connection

    def check_out(connection: _Connection, _record: Any, _pooled: Any) -> None:
        # One opened for this use is tried, whatever was lost meanwhile: SQLAlchemy gives up after a second refusal.
        if connection.was_used and connection.opened_at < peer.lost_at:
            raise DisconnectionError("it stood when another one was lost")
        connection.was_used = True

    engine = create_engine(
        url,
        connect_args=_CONNECT_ARGS | {"options": session, "autocommit": autocommit},
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=wait_seconds,
        pool_use_lifo=True,
        hide_parameters=True,
        pool_reset_on_return=None if autocommit else "rollback",
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
    )
    event.listen(engine, "do_connect", connect)
    event.listen(engine, "checkout", check_out)
    return engine


@contextmanager
def _without_rows() -> Iterator[None]:
    """What Postgres quotes of rows in an error (DETAIL, CONTEXT) may be what somebody asked, and errors are logged."""
    try:
        yield
    except (DBAPIError, psycopg.Error) as error:
        of_driver = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(of_driver, psycopg.Error) and of_driver.diag.message_primary:
            of_driver.args = error.args = (of_driver.diag.message_primary,)
        raise


def _transaction(engine: Engine, work: Callable[[Connection], T], tenant: _Tenant = _NOBODY) -> T:
    with _without_rows(), engine.begin() as connection:
        if is_held_to_row_security(connection):
            _say_who(driver_of(connection), tenant, for_transaction=True)
        return work(connection)


def is_held_to_row_security(connection: Connection) -> bool:
    """Whether its user sees only the rows of the tenant it speaks for."""
    return _is_held(driver_of(connection), connection.info)


def driver_of(connection: Connection) -> psycopg.Connection[Any]:
    """The driver's own connection, within the same transaction."""
    driver: psycopg.Connection[Any] | None = connection.connection.driver_connection
    assert driver is not None
    return driver


def _is_held(driver: psycopg.Connection[Any], known: MutableMapping[Any, Any]) -> bool:
    """Asked once for each connection, as soon as there are tables."""
    if _HELD not in known:
        row = driver.execute(_IS_HELD).fetchone()
        if row is None:
            return False
        known[_HELD] = row[0]
    return bool(known[_HELD])


def _say_who(driver: psycopg.Connection[Any], tenant: _Tenant, *, for_transaction: bool = False) -> None:
    driver.execute(_SAY_WHO, (tenant.id, for_transaction, tenant.proof, for_transaction))


def _relaxed(work: Callable[[Connection], T]) -> Callable[[Connection], T]:
    def relaxed(connection: Connection) -> T:
        connection.execute(_RELAX)
        return work(connection)

    return relaxed


def _single(engine: Engine, work: Callable[[Execute], T], tenant: _Tenant = _NOBODY) -> T:
    pooled = engine.raw_connection()
    driver = pooled.driver_connection
    assert isinstance(driver, _Connection)

    def execute(statement: TextClause, fields: Fields) -> list[Any]:
        cursor = driver.cursor(row_factory=namedtuple_row)
        cursor.execute(_driver_sql(statement, engine.dialect), fields)
        # Not `description`, which makes an object for each column.
        return cursor.fetchall() if cursor.pgresult is not None and cursor.pgresult.nfields else []

    try:
        with _without_rows():
            _speak_for(tenant, pooled, driver)
            return work(execute)
    finally:
        _give_back(pooled, driver)


def _speak_for(tenant: _Tenant, pooled: PoolProxiedConnection, driver: psycopg.Connection[Any]) -> None:
    """Said once for as long as the connection goes on for the same tenant: a round trip saved on most statements."""
    if _is_held(driver, pooled.info) and pooled.info.get(_ACTS_FOR, _NOBODY) != tenant:
        _say_who(driver, tenant)
        pooled.info[_ACTS_FOR] = tenant


def _give_back(pooled: PoolProxiedConnection, driver: _Connection) -> None:
    """Into the pool if it can be used again; one that is lost was lost with all of its age."""
    if driver.closed:
        driver.peer.lost_at = time.monotonic()
    if driver.pgconn.transaction_status != TransactionStatus.IDLE:
        pooled.invalidate()
    pooled.close()


@lru_cache(maxsize=256)
def _driver_sql(statement: TextClause, dialect: Dialect) -> str:
    """The statement in the driver's own words; made once."""
    return str(statement.compile(dialect=dialect))


def _brief(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
