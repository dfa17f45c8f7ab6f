"""Retention: what has ended long ago is gone, and the bill stays."""

from __future__ import annotations

from contextlib import closing
from typing import Any
from uuid import UUID

import pytest

from jobs import retention as retention_module
from jobs.batches import Batches, Line, Rejection
from jobs.conversations import Conversations, Item
from jobs.database import Database
from jobs.errors import NotFound
from jobs.ids import new_id
from jobs.retention import Purged, Retention
from jobs.schema import JobError
from jobs.settings import Settings
from jobs.signals import Signals
from jobs.store import Store
from jobs.streams import BEGINNING, Piece, Streams
from jobs.tables import metadata
from kit.contract import Tables, Worker, accept, request_of, turn_of

DAY = 86_400.0
CANARY = "canary-3f9a"


@pytest.fixture
def retention(database: Database) -> Retention:
    return Retention(database)


def ended(store: Store, worker: Worker, *, days: float = 0.0, tenant: str = "local", tables: Tables) -> UUID:
    job = accept(store, request_of(prompt=CANARY, metadata={"a": CANARY}), tenant=tenant)
    worker.run(job, error=JobError(code="engine_error", message=CANARY), outcome="failed")
    tables.move_back(job, "finished_at", days * DAY)
    return job


def left(tables: Tables) -> set[UUID]:
    return {row["id"] for row in tables.rows("SELECT id FROM jobs")}


def tables_with(tables: Tables, text: str) -> set[str]:
    """Every table in which some row holds the text, anywhere."""
    found = "SELECT count(*) FROM {0} WHERE {0}::text LIKE %s"
    return {name for name in metadata.tables if tables.value(found.format(name), f"%{text}%")}


def test_what_ended_long_ago_goes_and_its_bill_stays(
    retention: Retention, store: Store, worker: Worker, tables: Tables
) -> None:
    """Job, question, answer, attempts and errors are gone; what ended lately, and every bill, are there."""
    old = ended(store, worker, days=31, tables=tables)
    lately = ended(store, worker, days=29, tables=tables)
    assert retention.purge(30 * DAY) == Purged(jobs=1)
    assert left(tables) == {lately}
    assert tables.ledger(old)["state"] == "failed"
    with pytest.raises(NotFound):
        store.get(old)
    assert retention.purge(30 * DAY) == Purged()


def test_after_a_purge_no_table_holds_the_text(
    retention: Retention, store: Store, worker: Worker, tables: Tables, batches: Batches
) -> None:
    """Wherever it was: prompts, metadata, errors, names of conversations, lines that became no job."""
    ended(store, worker, tables=tables)
    turn = accept(store, turn_of(f"talk of {CANARY}", CANARY))
    worker.run(turn)
    fill(batches, worker)
    assert {"jobs", "payloads", "results", "attempts", "rejections", "conversations"} <= tables_with(tables, CANARY)
    assert retention.purge(0) == Purged(jobs=3, batches=1, conversations=1)
    assert tables_with(tables, CANARY) == set()
    assert tables.count("ledger") == 3


def fill(batches: Batches, worker: Worker, *, finish: bool = True) -> UUID:
    batch = batches.open(new_id(), {"kind": "file", "input": CANARY})
    lines = [Line(1, f"one {CANARY}", request_of(prompt=CANARY), 3)]
    refused = [Rejection(2, CANARY, JobError(code="bad", message=CANARY), "prompt")]
    batches.take_in(batch, lines, refused, start_offset=0, end_offset=9, last_line=2)
    batches.filled(batch.id)
    for claim in worker.claim_bulk(9):
        worker.settle(claim)
    if finish:
        batches.finish(batch.id)
    return batch.id


def test_a_batchs_lines_wait_for_their_output(
    retention: Retention, batches: Batches, worker: Worker, tables: Tables
) -> None:
    """Rows that have ended are needed until the output is handed over, however old they are."""
    batch = fill(batches, worker, finish=False)
    assert retention.purge(0) == Purged()
    assert tables.count("results") == 1
    batches.finish(batch)
    assert retention.purge(0) == Purged(jobs=1, batches=1)
    assert (tables.count("rejections"), tables.count("batches")) == (0, 0)


def test_what_has_not_ended_stays(retention: Retention, store: Store, worker: Worker, tables: Tables) -> None:
    """Queued, blocked and running jobs are nobody's past."""
    running = accept(store, turn_of("talk"))
    worker.claim(running)
    stay = {running, accept(store, turn_of("talk")), accept(store)}
    assert retention.purge(0) == Purged()
    assert left(tables) == stay


def test_a_conversation_stays_while_it_has_a_turn(
    retention: Retention, store: Store, worker: Worker, tables: Tables
) -> None:
    """Old turns go one by one; a turn after them has its own number, and sees what is left."""
    turns = [accept(store, turn_of("talk", f"turn {number}")) for number in range(2)]
    for turn in turns:
        worker.run(turn)
    tables.move_back(turns[0], "finished_at", 2 * DAY)
    assert retention.purge(DAY) == Purged(jobs=1)
    third = accept(store, turn_of("talk"))
    assert tables.job(third)["turn"] == 3
    assert store.history("local", "talk", 3)[0]["content"] == "turn 1"
    worker.run(third)
    assert retention.purge(0) == Purged(jobs=2, conversations=1)
    assert tables.job(accept(store, turn_of("talk")))["turn"] == 1


def test_one_tenants_past_alone(retention: Retention, store: Store, worker: Worker, tables: Tables) -> None:
    """Or everybody's but somebody's."""
    jobs = {name: ended(store, worker, days=9, tenant=name, tables=tables) for name in ("acme", "zeta", "local")}
    assert retention.purge(0, "acme") == Purged(jobs=1)
    assert left(tables) == {jobs["zeta"], jobs["local"]}
    assert retention.purge(0, but=["zeta"]) == Purged(jobs=1)
    assert left(tables) == {jobs["zeta"]}


@pytest.mark.parametrize(
    ("days", "only", "stay"),
    [
        ({"acme": 5.0}, None, {"acme 1", "zeta 1", "zeta 9"}),
        ({"*": 5.0}, None, {"acme 1", "zeta 1"}),
        ({"acme": 0.5, "*": 5.0}, None, {"zeta 1"}),
        ({"acme": 10.0, "*": 0.0}, None, {"acme 1", "acme 9"}),
        ({"acme": 10.0, "*": 0.0}, "acme", {"acme 1", "acme 9", "zeta 1", "zeta 9"}),
        ({"acme": 10.0, "*": 5.0}, "zeta", {"acme 1", "acme 9", "zeta 1"}),
        ({"acme": 0.0}, "zeta", {"acme 1", "acme 9", "zeta 1", "zeta 9"}),
        ({}, None, {"acme 1", "acme 9", "zeta 1", "zeta 9"}),
    ],
)
def test_each_tenant_is_kept_for_its_own_time(
    days: dict[str, float],
    only: str | None,
    stay: set[str],
    *,
    retention: Retention,
    store: Store,
    worker: Worker,
    tables: Tables,
) -> None:
    """A tenant's own number goes before that of everybody."""
    names: dict[Any, str] = {}
    for tenant in ("acme", "zeta"):
        for age in (1, 9):
            names[ended(store, worker, days=age, tenant=tenant, tables=tables)] = f"{tenant} {age}"
    retention.keep_for(days, only)
    assert {names[job] for job in left(tables)} == stay


def test_many_rows_go_in_steps(
    retention: Retention, store: Store, worker: Worker, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No long transaction: some at a time, until none are left, newer ones in between passed over."""
    monkeypatch.setattr(retention_module, "_ROWS", 2)
    stay = set()
    for number in range(9):
        job = ended(store, worker, days=0 if number % 3 else 9, tables=tables)
        stay |= {job} if number % 3 else set()
    assert retention.purge(DAY) == Purged(jobs=3)
    assert left(tables) == stay
    assert retention.purge(0) == Purged(jobs=6)


def test_items_put_in_by_hand_go_too(retention: Retention, database: Database, tables: Tables) -> None:
    """Old ones; a conversation stays while something new is in it."""
    conversations = Conversations(database)
    conversations.create("local", "talk", {}, [Item("msg_1", "user", CANARY), Item("msg_2", "user", "new")])
    aged = "UPDATE conversation_items SET created_at = now() - interval '2 days' WHERE id = 'msg_1'"
    assert tables.execute(aged) == 1
    assert tables.execute("UPDATE conversations SET created_at = now() - interval '2 days'") == 1
    assert retention.purge(DAY) == Purged()
    assert [item.id for item in conversations.items("local", "talk")] == ["msg_2"]
    assert tables_with(tables, CANARY) == set()
    assert retention.purge(0) == Purged(conversations=1)


def test_pieces_of_streams_are_forgotten(
    database: Database, store: Store, worker: Worker, tables: Tables, settings: Settings
) -> None:
    """What a job told in Redis goes with it; another job's stays."""
    old = ended(store, worker, days=2, tables=tables)
    new = ended(store, worker, tables=tables)
    with closing(Signals(settings)) as signals, closing(Streams(settings, signals)) as streams:
        piece = Piece("attempt", 0, 0, CANARY, 1)
        assert streams.append([(old, piece), (new, piece)])
        Retention(database, streams.forget).purge(DAY)
        told = streams.read([(old, BEGINNING), (new, BEGINNING)])
    assert [len(pieces) for _, pieces in told] == [0, 1]
