"""What holds when everybody comes at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from uuid import UUID

from sqlalchemy import text

from jobs.batches import Batches, Line
from jobs.database import Database
from jobs.ids import new_id
from jobs.states import State
from jobs.store import Claim, Settled, Settlement, Store, _settle
from kit.contract import WAITING_FOR_A_LOCK, Tables, Worker, accept, request_of, settlement
from kit.databases import connect
from kit.threads import all_at_once
from kit.waiting import wait_until

THREADS = 16
ROWS = 2_000
PAIRS = 1_000
GIVE_UP_SECONDS = 120.0


def take_in(batches: Batches, rows: int) -> None:
    batch = batches.open(new_id(), {})
    lines = [Line(number, f"line-{number}", request_of(), 3) for number in range(1, rows + 1)]
    batches.take_in(batch, lines, [], start_offset=0, end_offset=rows, last_line=rows)


def test_every_bulk_row_is_claimed_once(batches: Batches, database: Database, tables: Tables) -> None:
    """Sixteen threads of four workers drain two thousand rows: each is claimed exactly once, under its own token."""
    take_in(batches, ROWS)
    workers = [Worker.hire(database) for _ in range(4)]
    claimed: list[Claim] = []
    deadline = time.monotonic() + GIVE_UP_SECONDS

    def drain(worker: Worker) -> None:
        # An empty answer may mean that others just look at the rows that are left.
        while len(claimed) < ROWS and time.monotonic() < deadline:
            claimed.extend(worker.claim_bulk(17))

    all_at_once([partial(drain, workers[at % 4]) for at in range(THREADS)])
    assert len(claimed) == len({claim.id for claim in claimed}) == ROWS
    held = {(row["id"], row["token"]) for row in tables.rows("SELECT id, token FROM jobs WHERE state = 'running'")}
    assert held == {(claim.id, claim.token) for claim in claimed}
    assert tables.value("SELECT count(DISTINCT job_id) FROM attempts") == tables.count("attempts") == ROWS


def test_one_message_too_many(store: Store, database: Database, tables: Tables) -> None:
    """Sixteen threads that all have a message of the same jobs: one of them gets each."""
    workers = [Worker.hire(database) for _ in range(4)]
    made = [accept(store) for _ in range(20)]

    def try_all(worker: Worker) -> list[UUID]:
        return [job_id for job_id in made if worker.try_claim(job_id) is not None]

    won = all_at_once([partial(try_all, workers[at % 4]) for at in range(THREADS)])
    assert sorted(job_id for share in won for job_id in share) == sorted(made)
    assert tables.count("attempts") == len(made)


def test_cancel_against_finish(store: Store, worker: Worker, tables: Tables) -> None:
    """A thousand jobs are run and cancelled at once: each ends once, as one side was told, with one ledger row."""
    shares = 8
    made = [job_id for ids in all_at_once([partial(accept_many, store, PAIRS // shares)] * shares) for job_id in ids]
    cancelled: dict[UUID, State] = {}
    finished: dict[UUID, bool] = {}

    def finish(share: list[UUID], meeting: Barrier) -> None:
        for job_id in share:
            meeting.wait()
            claim = worker.try_claim(job_id)
            finished[job_id] = claim is not None and job_id in worker.settle(claim, busy_seconds=1.0).done

    def cancel(share: list[UUID], meeting: Barrier) -> None:
        for job_id in share:
            meeting.wait()
            cancelled[job_id], _ = store.cancel(job_id)

    meetings = [Barrier(2, timeout=GIVE_UP_SECONDS) for _ in range(shares)]
    all_at_once([partial(side, made[at::shares], meetings[at]) for at in range(shares) for side in (finish, cancel)])
    states = {row["id"]: row["state"] for row in tables.rows("SELECT id, state FROM jobs")}
    assert len(states) == PAIRS
    for job_id, state in states.items():
        assert finished[job_id] == (state == "succeeded")
        assert (cancelled[job_id] is State.CANCELLED) == (state == "cancelled")
    assert set(states.values()) <= {"succeeded", "cancelled"}
    bills = tables.rows("SELECT job_id, state, busy_seconds FROM ledger")
    assert {bill["job_id"]: bill["state"] for bill in bills} == states
    assert len(bills) == PAIRS
    assert sum(bill["busy_seconds"] for bill in bills) == list(states.values()).count("succeeded")


def accept_many(store: Store, jobs: int) -> list[UUID]:
    return [accept(store) for _ in range(jobs)]


def test_cancel_against_retry(store: Store, worker: Worker, tables: Tables) -> None:
    """Jobs that go back to the queue while they are cancelled all end cancelled, wherever the cancel met them."""
    made = accept_many(store, 64)
    claims = {job_id: worker.claim(job_id) for job_id in made}
    for start in range(0, 64, 16):
        some = made[start : start + 16]
        retries = [partial(worker.settle, claims[job_id], "retried") for job_id in some]
        cancels = [partial(store.cancel, job_id) for job_id in some]
        all_at_once([call for pair in zip(retries, cancels, strict=True) for call in pair])
    assert {tables.state(job_id) for job_id in made} == {State.CANCELLED}
    assert tables.count("ledger") == 64
    assert tables.value("SELECT count(*) FROM attempts WHERE ended_at IS NULL") == 0


def test_settlers_with_overlapping_rows(
    batches: Batches, store: Store, worker: Worker, tables: Tables, transactions: list[object]
) -> None:
    """Two that settle the same rows in opposite orders both hear that all are done, and neither waits for ever."""
    take_in(batches, 400)
    for _ in range(10):
        group = [settlement(claim) for claim in worker.claim_bulk(40)]
        transactions.clear()
        one, other = all_at_once([partial(store.settle, group), partial(store.settle, group[::-1])])
        assert one.done == other.done == {each.id for each in group}
        assert len(transactions) == 3  # who came second looked twice; no deadlock had to be broken
    assert tables.count("ledger") == tables.count("results") == 400


def test_rows_are_locked_in_one_order(batches: Batches, store: Store, worker: Worker, tables: Tables) -> None:
    """Even if Postgres chose to look the rows up in the order they are given, they are locked in the order of ids."""
    take_in(batches, 1_000)
    tables.execute("ANALYZE jobs")
    group = sorted((settlement(claim) for claim in worker.claim_bulk(10)), key=lambda one: one.id)

    def settle(settlements: list[Settlement]) -> Settled:
        with store.database._durable.begin() as connection:
            for plan in ("hashjoin", "mergejoin", "seqscan"):
                connection.execute(text(f"SET LOCAL enable_{plan} = off"))
            return _settle(connection, settlements)

    def wait_for(waiting: int) -> None:
        wait_until(lambda: tables.value(WAITING_FOR_A_LOCK) == waiting, GIVE_UP_SECONDS, f"{waiting} wait for a row")

    with ThreadPoolExecutor(2) as pool:
        with connect(store.database.url) as other, other.transaction():
            other.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", [group[-1].id])
            # Who is given the last row first comes first, and would be the first to have it.
            reverse = pool.submit(settle, group[::-1])
            wait_for(1)
            forward = pool.submit(settle, group)
            wait_for(2)
        assert reverse.result().done == forward.result().done == {each.id for each in group}


def test_finish_against_the_sweeper(store: Store, database: Database, tables: Tables) -> None:
    """A worker that settles while it is being buried: each job was ended by it or given to others, never both."""
    for _ in range(5):
        worker = Worker.hire(database)
        claims = [worker.claim(job_id) for job_id in accept_many(store, 10)]
        tables.end_lease(worker.id)
        settled: set[UUID] = set()
        both: list[Callable[[], object]] = [
            partial(settle_one_by_one, worker, claims, settled),
            partial(store.sweep, []),
        ]
        all_at_once(both)
        for claim in claims:
            state = "succeeded" if claim.id in settled else "queued"
            assert tables.state(claim.id) == state
            assert tables.outcomes(claim.id) == [{"succeeded": "succeeded", "queued": "lost"}[state]]
        assert tables.count("ledger") == tables.value("SELECT count(*) FROM jobs WHERE state = 'succeeded'")


def settle_one_by_one(worker: Worker, claims: list[Claim], settled: set[UUID]) -> None:
    for claim in claims:
        settled |= worker.settle(claim).done
