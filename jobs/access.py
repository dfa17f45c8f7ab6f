"""What Postgres itself lets a gateway do: the rows of the tenant it speaks for, and no change of any table.

Three things hold it. Row security (migrations 0002 and 0003) shows a user that is not the tables' owner only rows
of the tenant of its session, and checks what it writes. Privileges (`GRANTS`) leave it the columns that a job's life
takes. And the session cannot name its tenant freely: it has to prove it by an HMAC that only the process can make, so
that not even a statement of an attacker's own making changes over to another tenant. The key to check it is in a table
that the gateway's user cannot read.

Whoever owns the tables, as `HEADRACE_DATABASE_URL` says, is held by none of it, and pays nothing for it.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import Connection, make_url

from jobs.database import Database, driver_of
from jobs.errors import SettingsError
from jobs.signing import Purpose, key_for

_VARIABLE = "HEADRACE_GATEWAY_DATABASE_URL"
_BLOCK_BYTES = 64  # of SHA-256: HMAC works on keys of this length (RFC 2104)
_INNER, _OUTER = 0x36, 0x5C

# By table: what a producer does. Nothing deletes.
GRANTS = {
    "jobs": "SELECT, INSERT, UPDATE (state, run_after, published_at, finished_at, deadline_at, cancel_requested_at,"
    " worker_id, token)",
    "payloads": "SELECT, INSERT, UPDATE (request, policy, digest, forgotten_at)",
    "results": "SELECT, INSERT",
    "attempts": "SELECT, UPDATE (ended_at, outcome, error, busy_seconds, machine_dollars)",
    "ledger": "SELECT, INSERT",
    "batches": "SELECT, INSERT, UPDATE (state, input_offset, input_lines, finished_at)",
    "rejections": "SELECT, INSERT",
    "conversations": "SELECT, INSERT, UPDATE (turns, metadata, deleted_at)",
    "conversation_items": "SELECT, INSERT, UPDATE (item, deleted_at)",
    "files": "SELECT, INSERT, UPDATE (bytes, deleted_at)",
    "file_pieces": "SELECT, INSERT, UPDATE (data)",
    "api_batches": "SELECT, INSERT, UPDATE (state, output_file_id, error_file_id, errors, counts, in_progress_at,"
    " finalizing_at, completed_at, failed_at, expired_at, cancelling_at, cancelled_at, runner, runner_until)",
    "webhook_deliveries": "SELECT, INSERT, UPDATE (attempts, next_attempt_at, delivered_at, given_up_at, error)",
    "webhook_secrets": "SELECT",
    "quotas": "SELECT, UPDATE (used_tokens, minute_began_at)",
    "workers": "SELECT",
}
_FUNCTIONS = (
    "headrace_tenant()",
    "headrace_key(bytea)",
    "headrace_ended(uuid[])",
    "headrace_waiting()",
    "headrace_take_batch(uuid, double precision)",
    "headrace_tidy_files(integer)",
    "headrace_open_jobs()",
    "headrace_ends(timestamp with time zone, timestamp with time zone)",
    "headrace_take_webhooks(integer, double precision, text[])",
    "headrace_followers(integer)",
)


def admit_gateway(database_url: str, gateway_url: str, secret: str) -> None:
    """Make the user of the gateway's URL, or give it its password, and let it do what a gateway does.

    May be repeated, and is after each migration. Raises SettingsError if that user may do too much, or cannot be made.
    """
    login = make_url(gateway_url)
    if not login.username or login.username == make_url(database_url).username:
        raise SettingsError(_VARIABLE, "names no user of its own")
    database = Database(database_url, pool_size=1)
    try:
        database.run(lambda connection: _admit(connection, str(login.username), login.password or "", secret))
    finally:
        database.close()


def _admit(connection: Connection, user: str, password: str, secret: str) -> None:
    driver = driver_of(connection)
    driver.execute("SELECT pg_advisory_xact_lock(hashtext('headrace.gateway'))")
    _make_user(driver, user, password)
    _refuse_the_mighty(driver, user)
    name = sql.Identifier(user)
    driver.execute(sql.SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(_database(driver)))
    for table, rights in GRANTS.items():
        driver.execute(sql.SQL("REVOKE ALL ON {} FROM {}").format(sql.Identifier(table), name))
        driver.execute(sql.SQL("GRANT {} ON {} TO {}").format(sql.SQL(rights), sql.Identifier(table), name))
    for function in _FUNCTIONS:
        driver.execute(sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}").format(sql.SQL(function), name))
    key = key_for(secret, Purpose.TENANTS)
    driver.execute("DELETE FROM tenant_proofs")
    driver.execute(
        "INSERT INTO tenant_proofs (inner_pad, outer_pad) VALUES (%s, %s)", (_pad(key, _INNER), _pad(key, _OUTER))
    )


def _make_user(driver: psycopg.Connection[Any], user: str, password: str) -> None:
    found = driver.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (user,)).fetchone()
    verb = "ALTER" if found else "CREATE"
    statement = sql.SQL(f"{verb} ROLE {{}} LOGIN PASSWORD {{}}").format(sql.Identifier(user), sql.Literal(password))
    try:
        with driver.transaction():  # a savepoint: what fails here need not end the whole
            driver.execute(statement)
    except psycopg.errors.InsufficientPrivilege as error:
        if not found:
            message = f"{user!r} does not exist, and the user of HEADRACE_DATABASE_URL may not make it: CREATE ROLE"
            raise SettingsError(_VARIABLE, message) from error


def _refuse_the_mighty(driver: psycopg.Connection[Any], user: str) -> None:
    row = driver.execute(_MIGHT, (user, user)).fetchone()
    assert row is not None
    if row[0]:
        raise SettingsError(_VARIABLE, f"{user!r} is a superuser, owns tables or bypasses row security")


_INSERT_PROOFS = "INSERT INTO tenant_proofs (inner_pad, outer_pad) VALUES (%s, %s)"

_MIGHT = """
SELECT rolsuper OR rolbypassrls OR rolcreaterole OR EXISTS (
    SELECT 1 FROM pg_class c
    WHERE pg_has_role(%s, c.relowner, 'MEMBER') AND c.relnamespace = current_schema::regnamespace
) FROM pg_roles WHERE rolname = %s
"""


def _database(driver: psycopg.Connection[Any]) -> sql.Identifier:
    return sql.Identifier(driver.info.dbname)


def _pad(key: bytes, value: int) -> bytes:
    return bytes(byte ^ value for byte in key.ljust(_BLOCK_BYTES, b"\0"))
