"""What Postgres shows a gateway's user: the rows of the tenant it proves to speak for, whatever it asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import make_url, text

from jobs.access import GRANTS, admit_gateway
from jobs.api_batches import ApiBatches
from jobs.batches import Batches, Line, Rejection
from jobs.conversations import Conversations, Item
from jobs.database import Database
from jobs.errors import IdempotencyConflict, NotFound, SettingsError
from jobs.files import Files
from jobs.ids import new_id
from jobs.keys import Keys
from jobs.overview import Ends, open_jobs
from jobs.schema import JobError
from jobs.signing import Purpose, Signer
from jobs.states import State
from jobs.store import Store
from jobs.tables import metadata
from jobs.webhooks import Webhooks
from kit.contract import Tables, Worker, accept, request_of, turn_of
from kit.databases import SECRET, connect

SIGNER = Signer(SECRET, Purpose.TENANTS)
MINE, THEIRS = "acme", "zeta"
WITH_TENANTS = sorted(table.name for table in metadata.sorted_tables if "tenant_id" in table.columns)
# Workers serve everybody; who may come in is nobody's to see.
SHARED, HIDDEN = {"workers"}, {"api_keys", "tenant_proofs"}
OWNED = sorted({*WITH_TENANTS} - SHARED - HIDDEN)


@pytest.fixture(scope="module")
def gateway_url(contract_url: str) -> str:
    """As whom a gateway connects."""
    url = make_url(contract_url).set(username="headrace_test_gateway", password="pass")
    admitted = url.render_as_string(hide_password=False)
    admit_gateway(contract_url, admitted, SECRET)
    return admitted


@pytest.fixture
def gateway(gateway_url: str, tables: Tables) -> Iterator[Database]:
    with closing(Database(gateway_url, pool_size=2, signer=SIGNER)) as database:
        yield database


@pytest.fixture
def session(gateway_url: str, tables: Tables) -> Iterator[psycopg.Connection[Any]]:
    """Hand-written SQL of the gateway's user, on behalf of MINE."""
    with closing(connect(gateway_url)) as connection:
        speak_for(connection, MINE, SIGNER.sign(MINE))
        yield connection


def speak_for(connection: psycopg.Connection[Any], tenant: str, proof: str) -> None:
    connection.execute(
        "SELECT set_config('headrace.tenant', %s, false), set_config('headrace.proof', %s, false)", (tenant, proof)
    )


@pytest.fixture
def everything(database: Database, worker: Worker) -> dict[str, dict[str, Any]]:
    """A row in every table for both tenants; by tenant, what identifies them."""
    return {tenant: fill(database, worker, tenant) for tenant in (MINE, THEIRS)}


def fill(database: Database, worker: Worker, tenant: str) -> dict[str, Any]:
    store, batches = Store(database), Batches(database, tenant)
    ended = accept(
        store, request_of(prompt=f"the secret of {tenant}", webhook=f"https://{tenant}.example/"), tenant=tenant
    )
    worker.run(ended)
    turn = accept(store, turn_of("talk"), tenant=tenant)
    waiting = accept(store, tenant=tenant)
    running = accept(store, tenant=tenant)
    claim = worker.claim(running)
    batch = batches.open(new_id(), {"kind": "file"})
    lines = [Line(1, "one", request_of(), 3)]
    refused = [Rejection(2, "two", JobError(code="bad", message="bad"), "prompt")]
    batches.take_in(batch, lines, refused, start_offset=0, end_offset=9, last_line=2)
    files, file_id = Files(database), new_id()
    files.begin(file_id, tenant, "batch", "in.jsonl", None)
    files.write(file_id, tenant, 0, b"x")
    files.finish(file_id, tenant, 1)
    ApiBatches(database).create(new_id(), tenant, endpoint="/v1/responses", input_file_id=file_id, metadata={})
    Conversations(database).create(tenant, "by hand", {}, [Item("msg_1", "user", f"the secret of {tenant}")])
    Webhooks(database, SECRET).rotate(tenant)
    key, secret = Keys(database).create(tenant, quota_tokens_per_minute=10)
    return {
        "job": waiting,
        "ended": ended,
        "turn": turn,
        "running": running,
        "claim": claim,
        "batch": batch,
        "key": key,
        "secret": secret,
    }


def snapshot(tables: Tables, tenant: str) -> dict[str, list[str]]:
    """Every row of the tenant, as text."""
    query = "SELECT t::text AS row FROM {} t WHERE tenant_id = %s ORDER BY 1"
    return {name: [row["row"] for row in tables.rows(query.format(name), tenant)] for name in WITH_TENANTS}


def as_mine(gateway: Database) -> tuple[Store, Batches]:
    database = gateway.as_tenant(MINE)
    return Store(database), Batches(database, MINE)


# -- the sweep ------------------------------------------------------------------------------------------------------


def test_every_table_is_held(tables: Tables) -> None:
    """No table is without row security, and what the gateway may do is said of each or nothing is allowed."""
    rows = tables.rows("""
        SELECT relname, relrowsecurity FROM pg_class
        WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'alembic_version'
    """)
    assert {row["relname"] for row in rows} == set(metadata.tables)
    assert all(row["relrowsecurity"] for row in rows)
    assert set(GRANTS) == set(metadata.tables) - HIDDEN


@pytest.mark.parametrize("table", OWNED)
def test_a_session_sees_its_own_rows_alone(
    table: str, everything: dict[str, Any], session: psycopg.Connection[Any], tables: Tables
) -> None:
    """Whatever is asked of the table, no row of another tenant comes."""
    everyone = tables.rows(f"SELECT DISTINCT tenant_id FROM {table}")
    assert {row["tenant_id"] for row in everyone} >= {MINE, THEIRS}
    for query in (
        f"SELECT DISTINCT tenant_id FROM {table}",
        f"SELECT DISTINCT tenant_id FROM {table} WHERE tenant_id = '{MINE}' OR 1 = 1",
        f"SELECT DISTINCT tenant_id FROM (SELECT * FROM {table} UNION ALL SELECT * FROM {table}) t",
    ):
        assert session.execute(query.encode()).fetchall() == [(MINE,)]
    theirs = session.execute(f"SELECT count(*) FROM {table} WHERE tenant_id = '{THEIRS}'".encode()).fetchone()
    assert theirs == (0,)


@pytest.mark.parametrize("table", sorted(metadata.tables))
def test_a_session_changes_nothing_of_others(
    table: str, everything: dict[str, Any], session: psycopg.Connection[Any], tables: Tables
) -> None:
    """Each column of every row, set by hand; the rows deleted, emptied, given away: theirs are as they were."""
    before = snapshot(tables, THEIRS)
    statements = [f"UPDATE {table} SET {column.name} = {column.name}" for column in metadata.tables[table].columns]
    statements += [f"UPDATE {table} SET {column.name} = NULL" for column in metadata.tables[table].columns]
    statements += [
        f"DELETE FROM {table}",
        f"TRUNCATE {table} CASCADE",
        f"DROP TABLE {table} CASCADE",
        f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
        f"DROP POLICY tenant ON {table}",
        f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE",
        f"UPDATE {table} SET tenant_id = '{THEIRS}'",
        f"INSERT INTO {table} SELECT * FROM {table} WHERE tenant_id = '{THEIRS}'",
        f"CREATE TRIGGER t AFTER INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    ]
    for statement in statements:
        attempt(session, statement)
    assert snapshot(tables, THEIRS) == before


def attempt(session: psycopg.Connection[Any], statement: str, *values: Any) -> bool:
    """Whether Postgres took it."""
    try:
        session.execute(statement.encode(), values)
    except psycopg.Error:
        return False
    return True


@pytest.mark.parametrize("table", OWNED)
def test_no_row_can_be_made_for_others(
    table: str, everything: dict[str, Any], session: psycopg.Connection[Any], tables: Tables
) -> None:
    """A copy of an own row under another tenant's name is refused."""
    columns = [column.name for column in metadata.tables[table].columns]
    values = ", ".join(f"'{THEIRS}'" if name == "tenant_id" else name for name in columns)
    before = snapshot(tables, THEIRS)
    assert not attempt(session, f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM {table}")
    assert snapshot(tables, THEIRS) == before


@pytest.mark.parametrize("hidden", sorted(HIDDEN))
def test_what_is_hidden_cannot_even_be_read(hidden: str, session: psycopg.Connection[Any]) -> None:
    """Digests of secrets, and the key that proves a tenant, are for the owner's eyes."""
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute(f"SELECT * FROM {hidden}".encode())


# -- what hangs on another's rows -----------------------------------------------------------------------------------


HOSTAGES = {
    "results": "INSERT INTO results (job_id, tenant_id, choices, usage, timings) VALUES (%s, 'acme', '[]', '{}', '{}')",
    "ledger": "INSERT INTO ledger (job_id, tenant_id, model, state) VALUES (%s, 'acme', 'echo', 'failed')",
    "payloads": "INSERT INTO payloads (job_id, tenant_id, request, digest) VALUES (%s, 'acme', '{}', '')",
    "attempts": "INSERT INTO attempts (token, job_id, tenant_id, worker_id)"
    " VALUES (gen_random_uuid(), %s, 'acme', gen_random_uuid())",
    "webhook_deliveries": "INSERT INTO webhook_deliveries (id, tenant_id, job_id, url)"
    " VALUES (gen_random_uuid(), 'acme', %s, 'https://acme.example/')",
}


@pytest.mark.parametrize("table", HOSTAGES)
def test_nothing_can_be_hung_on_anothers_job(
    table: str, everything: dict[str, Any], session: psycopg.Connection[Any], worker: Worker, store: Store
) -> None:
    """A row of ours that names a running job of theirs would keep its end from being written. It is refused."""
    theirs = everything[THEIRS]
    assert not attempt(session, HOSTAGES[table], theirs["running"])
    assert theirs["running"] in worker.settle(theirs["claim"]).done
    assert store.get(theirs["running"], THEIRS).state is State.SUCCEEDED


def test_no_line_can_be_put_into_anothers_batch(
    everything: dict[str, Any], session: psycopg.Connection[Any], database: Database
) -> None:
    """Neither a job nor a rejection."""
    theirs = everything[THEIRS]["batch"]
    job = """
        INSERT INTO jobs (id, tenant_id, state, model, lane, priority, max_attempts, batch_id, line)
        VALUES (gen_random_uuid(), 'acme', 'queued', 'echo', 'bulk', 0, 1, %s, 77)
    """
    rejection = "INSERT INTO rejections (batch_id, line, tenant_id, error) VALUES (%s, 77, 'acme', '{}')"
    assert not attempt(session, job, theirs.id)
    assert not attempt(session, rejection, theirs.id)
    assert attempt(session, job, everything[MINE]["batch"].id)
    assert Batches(database, THEIRS).progress(theirs.id).total == 2


# -- the proof ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tenant", "proof"),
    [
        (THEIRS, ""),
        (THEIRS, SIGNER.sign(MINE)),
        (THEIRS, "0" * 64),
        (THEIRS, Signer("another secret, as long as it has to be", Purpose.TENANTS).sign(THEIRS)),
        (THEIRS, Signer(SECRET, Purpose.MESSAGES).sign(THEIRS)),
        (f"{THEIRS}' OR '1'='1", SIGNER.sign(THEIRS)),
        ("", ""),
        (f"{MINE}x", SIGNER.sign(MINE)),
    ],
)
def test_a_session_cannot_change_over_without_proof(
    tenant: str, proof: str, everything: dict[str, Any], session: psycopg.Connection[Any]
) -> None:
    """Anybody can set the session's tenant, and then sees nothing at all."""
    speak_for(session, tenant, proof)
    for table in OWNED:
        assert session.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() == (0,)


def test_a_session_that_says_nothing_sees_nothing(everything: dict[str, Any], gateway_url: str) -> None:
    """The default is no row."""
    with closing(connect(gateway_url)) as silent:
        for table in OWNED:
            assert silent.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() == (0,)


@pytest.mark.parametrize("statement", ["RESET ROLE", "SET ROLE headrace", "SET SESSION AUTHORIZATION headrace"])
def test_a_session_cannot_become_somebody_else(
    statement: str, everything: dict[str, Any], session: psycopg.Connection[Any]
) -> None:
    """It is its user's own login: there is nothing to go back to."""
    attempt(session, statement)
    assert session.execute("SELECT DISTINCT tenant_id FROM jobs").fetchall() == [(MINE,)]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE mine (id int)",
        "CREATE TEMPORARY TABLE mine (id int)",
        "CREATE SCHEMA mine",
        "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE OR REPLACE FUNCTION headrace_tenant() RETURNS text LANGUAGE sql AS $$SELECT 'zeta'$$",
        "CREATE VIEW mine AS SELECT * FROM jobs",
        "CREATE ROLE mine",
        "CREATE DATABASE mine",
        "CREATE EXTENSION pgcrypto",
        "ALTER TABLE jobs ADD COLUMN mine int",
        "CREATE INDEX ON jobs (model)",
        "GRANT SELECT ON api_keys TO PUBLIC",
        "COPY jobs TO PROGRAM 'cat'",
        "COPY jobs TO '/tmp/jobs'",
    ],
)
def test_a_session_defines_nothing(statement: str, session: psycopg.Connection[Any]) -> None:
    """No DDL, no files, no programs."""
    assert not attempt(session, statement)


# -- what a producer does all the same ------------------------------------------------------------------------------


def test_a_job_lives_under_row_security(gateway: Database, worker: Worker) -> None:
    """Accepted, seen, noted, cancelled by the gateway's user; run by a worker, which nothing holds."""
    store, _ = as_mine(gateway)
    job, other = (accept(store, request_of(prompt=f"it's \0 {n}"), tenant=MINE) for n in range(2))
    store.mark_published([job])
    worker.run(job)
    assert store.get(job, MINE).state is State.SUCCEEDED
    assert store.cancel(other, MINE) == (State.CANCELLED, ())
    assert {found.id for found in store.list(MINE)} == {job, other}


def test_conversations_live_under_row_security(gateway: Database, worker: Worker) -> None:
    """Turns wait for each other, are read back, and go on when one is cancelled."""
    store, _ = as_mine(gateway)
    first, second, third = (accept(store, turn_of("talk", f"turn {n}"), tenant=MINE) for n in range(3))
    worker.run(first)
    assert store.get(second, MINE).state is State.QUEUED
    assert len(store.history(MINE, "talk", 2)) == 2
    _, released = store.cancel(second, MINE)
    assert [turn.id for turn in released] == [third]


def test_batches_live_under_row_security(gateway: Database, worker: Worker, database: Database) -> None:
    """A file goes in without COPY and comes out byte for byte; what waits can be cancelled."""
    _, batches = as_mine(gateway)
    batch = batches.open(new_id(), {"kind": "file"})
    odd = request_of(prompt='tab\t, \0, "{\\N}", NULL, \U0001f600', metadata={"a": "b"}, deadline_seconds=60)
    lines = [Line(1, "odd", odd, 3, endpoint="/v1/completions"), Line(2, "plain", request_of(), 3)]
    refused = [Rejection(3, None, JobError(code="bad", message="bad"), "prompt")]
    batches.take_in(batch, lines, refused, start_offset=0, end_offset=9, last_line=3)
    batches.filled(batch.id)
    [claim] = worker.claim_bulk(1)
    assert claim.request == odd
    assert claim.seconds_left is not None
    worker.settle(claim)
    batches.cancel(batch.id)
    page = batches.outputs(batch.id, 0)
    assert page is not None
    assert [(job.custom_id, job.state) for job in page.jobs] == [("odd", "succeeded"), ("plain", "cancelled")]
    assert [rejection.number for rejection in batches.rejected(batch.id, 0)] == [3]
    assert batches.known(batch.id, ["odd", "plain", "new"]) == {"odd", "plain"}
    assert batches.summary(batch.id).succeeded == 1


def test_keys_are_checked_under_row_security(gateway: Database, everything: dict[str, Any]) -> None:
    """A gateway finds a key by its secret, and cannot list, make or revoke any."""
    keys = Keys(gateway)
    assert keys.authenticate(everything[MINE]["secret"]) == everything[MINE]["key"]
    for forbidden in (keys.list, lambda: keys.create(MINE), lambda: keys.revoke(everything[MINE]["key"].id)):
        with pytest.raises(Exception, match="permission denied"):
            forbidden()


def test_figures_are_of_all_tenants(gateway: Database, everything: dict[str, Any], worker: Worker) -> None:
    """A gateway tells how many jobs there are and have ended, whoever's; that is all it sees of other tenants."""
    ends = Ends(gateway)
    ends.look()
    for tenant in (MINE, THEIRS):
        worker.settle(everything[tenant]["claim"])
    assert sum(one.jobs for one in ends.look()) == 2
    queued = [one.jobs for one in open_jobs(gateway) if (one.lane, one.state) == ("interactive", "queued")]
    assert queued[0] >= 2


def test_a_connection_serves_tenants_in_turn(gateway: Database, everything: dict[str, Any]) -> None:
    """Pools are shared: who a connection spoke for before is forgotten, in and out of transactions."""
    for _ in range(2):
        for tenant, other in ((MINE, THEIRS), (THEIRS, MINE)):
            store = Store(gateway.as_tenant(tenant))
            assert store.get(everything[tenant]["job"], tenant).tenant_id == tenant
            for stranger in (everything[other]["job"], new_id()):
                with pytest.raises(NotFound):
                    store.get(stranger, other)
                with pytest.raises(NotFound):
                    store.cancel(stranger, other)
        with pytest.raises(NotFound):
            Store(gateway).get(everything[MINE]["job"], MINE)


def test_lost_connections_are_replaced(gateway: Database, everything: dict[str, Any], tables: Tables) -> None:
    """A restart of Postgres costs a gateway no answer, in and out of transactions."""
    store, _ = as_mine(gateway)
    for look in (
        lambda: store.get(everything[MINE]["job"], MINE),
        lambda: store.cancel(everything[MINE]["ended"], MINE),
    ):
        look()
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'headrace_test_gateway'"
        assert tables.rows(ended)
        look()


def test_errors_quote_no_rows(database: Database, everything: dict[str, Any]) -> None:
    """What Postgres says of rows that it refuses may be what somebody asked, and errors are logged."""
    copy_of = text("INSERT INTO conversations (tenant_id, id, turns) VALUES (:tenant, :id, 1)")
    row = {"tenant": MINE, "id": "talk"}
    for attempt_it in (lambda: database.rows(copy_of, row), lambda: database.run(lambda c: c.execute(copy_of, row))):
        with pytest.raises(Exception, match="duplicate key") as refused:
            attempt_it()
        assert "talk" not in str(refused.value)


# -- the same answer as for an unknown id -----------------------------------------------------------------------------


def test_anothers_ids_are_as_unknown_ones(everything: dict[str, Any], database: Database, gateway: Database) -> None:
    """Over either connection, whoever asks with another's id learns what a made-up id would tell."""
    theirs = everything[THEIRS]
    for held in (database, gateway.as_tenant(MINE)):
        store, batches = Store(held), Batches(held, MINE)
        for job, batch in ((theirs["job"], theirs["batch"].id), (new_id(), new_id())):
            assert answers(store, batches, job, batch) == answers(store, batches, new_id(), new_id())


def answers(store: Store, batches: Batches, job: UUID, batch: UUID) -> list[str]:
    """What each look and change says, without the id."""
    said: list[str] = []
    calls = {
        "get": lambda: store.get(job, MINE),
        "cancel": lambda: store.cancel(job, MINE),
        "list of a batch": lambda: store.list(MINE, batch_id=batch),
        "list before": lambda: len(store.list(MINE, before=job)) >= 0,
        "batch": lambda: batches.get(batch),
        "models": lambda: batches.models(batch),
        "progress": lambda: batches.progress(batch),
        "summary": lambda: batches.summary(batch),
        "samples": lambda: batches.samples(batch, 9),
        "outputs": lambda: batches.outputs(batch, 0),
        "rejected": lambda: batches.rejected(batch, 0),
        "known": lambda: batches.known(batch, ["one", "two"]),
        "cancel a batch": lambda: batches.cancel(batch),
        "pause": lambda: batches.pause(batch),
        "finish": lambda: batches.finish(batch),
    }
    for name, call in calls.items():
        try:
            said.append(f"{name}: {call()}")
        except (NotFound, IdempotencyConflict) as error:
            said.append(f"{name}: {error}".replace(str(job), "ID").replace(str(batch), "ID"))
    return said


def test_others_are_untouched_by_calls_with_their_ids(
    everything: dict[str, Any], batches: Batches, tables: Tables
) -> None:
    """Also over a connection that nothing holds: each statement names its tenant."""
    before = snapshot(tables, THEIRS)
    mine = Batches(batches.database, MINE)
    store = Store(batches.database)
    answers(store, mine, everything[THEIRS]["job"], everything[THEIRS]["batch"].id)
    for job in ("running", "turn", "ended"):
        with pytest.raises(NotFound):
            store.cancel(everything[THEIRS][job], MINE)
    assert snapshot(tables, THEIRS) == before


# -- admission --------------------------------------------------------------------------------------------------------


def test_admission_may_be_repeated(contract_url: str, gateway_url: str, session: psycopg.Connection[Any]) -> None:
    """Each migration admits again; sessions that are open go on."""
    admit_gateway(contract_url, gateway_url, SECRET)
    assert session.execute("SELECT count(*) FROM jobs").fetchone() == (0,)


def test_a_mighty_user_is_refused(contract_url: str) -> None:
    """Whom row security does not hold is no gateway."""
    with pytest.raises(SettingsError, match="of its own"):
        admit_gateway(contract_url, contract_url, SECRET)
    with connect(contract_url) as owner:
        owner.execute("DROP ROLE IF EXISTS headrace_test_mighty")
        owner.execute("CREATE ROLE headrace_test_mighty LOGIN BYPASSRLS PASSWORD 'pass'")
    mighty = make_url(contract_url).set(username="headrace_test_mighty", password="pass")
    with pytest.raises(SettingsError, match="bypasses row security"):
        admit_gateway(contract_url, mighty.render_as_string(hide_password=False), SECRET)
