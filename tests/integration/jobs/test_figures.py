"""The figures of the whole: jobs as they are, and ends that are counted once, whenever they were committed."""

from __future__ import annotations

import pytest

from jobs.batches import Batches, Line
from jobs.database import Database
from jobs.ids import new_id
from jobs.overview import Ends, open_jobs
from jobs.store import Store
from kit.contract import MODEL, Tables, Worker, accept, request_of, turn_of


@pytest.fixture
def ends(database: Database) -> Ends:
    """Ends from now on."""
    ends = Ends(database)
    assert ends.look() == []
    return ends


def counted(ends: Ends) -> dict[tuple[str, str], tuple[int, int, int]]:
    """By lane and state: jobs, tokens of prompts, tokens of answers."""
    found = ends.look()
    assert {one.model for one in found} <= {MODEL}
    return {(one.lane, one.state): (one.jobs, one.prompt_tokens, one.completion_tokens) for one in found}


def test_open_jobs_of_each_kind(database: Database, store: Store, worker: Worker, batches: Batches) -> None:
    """By model, lane and state, of all tenants together; what has ended is none of them."""
    for tenant in ("acme", "zeta"):
        accept(store, tenant=tenant)
    worker.claim(accept(store))
    worker.run(accept(store))
    for _ in range(2):
        accept(store, turn_of("talk"))
    batch = batches.open(new_id(), {"kind": "file"})
    lines = [Line(number, str(number), request_of(), 3) for number in (1, 2, 3)]
    batches.take_in(batch, lines, [], start_offset=0, end_offset=9, last_line=3)
    batches.filled(batch.id)
    worker.claim_bulk(1)
    found = {(one.model, one.lane, one.state): one.jobs for one in open_jobs(database)}
    assert found == {
        (MODEL, "interactive", "queued"): 3,
        (MODEL, "interactive", "running"): 1,
        (MODEL, "interactive", "blocked"): 1,
        (MODEL, "bulk", "queued"): 2,
        (MODEL, "bulk", "running"): 1,
    }


def test_how_long_the_oldest_waits(database: Database, store: Store, tables: Tables) -> None:
    """Since it could start: one that is not due yet has not waited."""
    accept(store)
    tables.execute("UPDATE jobs SET run_after = now() - interval '1 hour'")
    accept(store)
    [queued] = open_jobs(database)
    assert queued.oldest_seconds == pytest.approx(3600, abs=60)
    tables.execute("UPDATE jobs SET run_after = now() + interval '1 hour'")
    [queued] = open_jobs(database)
    assert (queued.jobs, queued.oldest_seconds) == (2, 0)


def test_ends_are_counted_from_the_first_look_on(database: Database, store: Store, worker: Worker) -> None:
    """By lane and state, with the tokens that were billed."""
    worker.run(accept(store))
    ends = Ends(database)
    assert ends.look() == []
    for outcome in ("succeeded", "succeeded", "failed"):
        worker.run(accept(store, max_attempts=1), outcome)
    store.cancel(accept(store))
    assert counted(ends) == {
        ("interactive", "succeeded"): (2, 6, 4),
        ("interactive", "failed"): (1, 0, 0),
        ("interactive", "cancelled"): (1, 0, 0),
    }


def test_ends_of_a_batch_are_of_the_other_lane(ends: Ends, batches: Batches, worker: Worker) -> None:
    """A ledger row knows its batch."""
    batch = batches.open(new_id(), {"kind": "file"})
    batches.take_in(batch, [Line(1, "1", request_of(), 3)], [], start_offset=0, end_offset=9, last_line=1)
    batches.filled(batch.id)
    [claim] = worker.claim_bulk(1)
    worker.settle(claim)
    assert counted(ends) == {("bulk", "succeeded"): (1, 3, 2)}


def test_an_end_is_counted_once_however_long_ago(ends: Ends, store: Store, worker: Worker, tables: Tables) -> None:
    """Looks that come later neither lose it nor count it again, within the last minutes or after them."""
    first = {("interactive", "succeeded"): (1, 3, 2)}
    worker.run(accept(store))
    for _ in range(3):
        assert counted(ends) == first
    _pass(ends, tables, "1 hour")
    for _ in range(3):
        assert counted(ends) == first
    worker.run(accept(store))
    for _ in range(2):
        assert counted(ends) == {("interactive", "succeeded"): (2, 6, 4)}


def test_an_end_that_is_committed_late_is_counted(ends: Ends, store: Store, worker: Worker, tables: Tables) -> None:
    """A row has the time at which its transaction began: others that began later may have been seen before it."""
    _pass(ends, tables, "1 hour")
    worker.run(accept(store))
    assert counted(ends) == {("interactive", "succeeded"): (1, 3, 2)}
    late = accept(store)
    worker.run(late)
    tables.execute("UPDATE ledger SET created_at = now() - interval '90 s' WHERE job_id = %s", late)
    assert counted(ends) == {("interactive", "succeeded"): (2, 6, 4)}


@pytest.mark.parametrize(
    "rows",
    [
        "jobs WHERE state = 'queued' AND lane = 'interactive'",
        "jobs WHERE state = 'queued' AND lane = 'bulk'",
        "jobs WHERE state = 'running'",
        "jobs WHERE state = 'blocked'",
        "ledger WHERE created_at >= now()",
    ],
)
def test_the_figures_are_read_off_indexes(rows: str, database: Database, tables: Tables) -> None:
    """However many jobs have ended: where it may, Postgres walks through no table for any of them."""
    tables.execute("SET enable_seqscan = off")
    try:
        plan = tables.rows(f"EXPLAIN SELECT model, count(*) FROM {rows} GROUP BY model")
    finally:
        tables.execute("RESET enable_seqscan")
    assert not any("Seq Scan" in line for row in plan for line in row.values())


def _pass(ends: Ends, tables: Tables, time: str) -> None:
    """As if everything so far, the first look too, had been so much earlier."""
    tables.execute(f"UPDATE ledger SET created_at = created_at - interval '{time}'")
    [row] = tables.rows(f"SELECT %s::timestamptz - interval '{time}' AS moved", ends._since)
    ends._since = row["moved"]
