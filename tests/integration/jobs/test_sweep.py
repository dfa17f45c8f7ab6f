"""What no living worker will mend: rows of the dead, lost messages. Times are changed in the rows, never waited for."""

from __future__ import annotations

from functools import partial
from uuid import UUID

import pytest
from sqlalchemy import text

import jobs.store
from jobs.batches import Batch, Batches, Line
from jobs.database import Database
from jobs.ids import new_id
from jobs.states import BatchState, State, WorkerState
from jobs.store import Store, Swept, Waiting
from kit.contract import MODEL, Tables, Worker, accept, request_of
from kit.threads import all_at_once


def sweep(store: Store, *empty_queues: str) -> Swept:
    swept = store.sweep(empty_queues)
    assert swept is not None
    return swept


def published(swept: Swept) -> set[UUID]:
    return {waiting.id for waiting in swept.to_publish}


# == batches ====================================================================================================


def _batch_of(batches: Batches, kind: str) -> Batch:
    batch = batches.open(new_id(), {"kind": kind})
    batches.take_in(batch, [Line(1, "a", request_of(), 3)], [], start_offset=0, end_offset=1, last_line=1)
    batches.filled(batch.id)
    return batch


def test_a_batch_of_submit_many_is_finished_with_its_last_row(store: Store, batches: Batches, worker: Worker) -> None:
    """Nobody comes back for it, so the sweeper closes it; a file's batch waits until its output is handed over."""
    many, file = _batch_of(batches, "submit_many"), _batch_of(batches, "file")
    claims = worker.claim_bulk(2)
    sweep(store)
    assert batches.get(many.id).state is BatchState.RUNNING
    for claim in claims:
        worker.settle(claim)
    sweep(store)
    assert batches.get(many.id).state is BatchState.FINISHED
    assert batches.get(file.id).state is BatchState.RUNNING


def test_a_row_that_returns_to_a_cancelled_batch_ends(
    store: Store, batches: Batches, worker: Worker, tables: Tables
) -> None:
    """A row that was claimed while its batch was cancelled, and queued again by a retry, is not left there for ever."""
    batch = _batch_of(batches, "file")
    (claim,) = worker.claim_bulk(1)
    batches.cancel(batch.id)
    # as if the claim had been committed between the cancel's two steps, and a retry had put the row back
    tables.execute("UPDATE jobs SET cancel_requested_at = NULL")
    worker.settle(claim, "retried")
    assert tables.job(claim.id)["state"] == "queued"
    assert sweep(store).abandoned == 1
    assert tables.job(claim.id)["state"] == "cancelled"
    assert tables.count("ledger") == 1


# == dead workers ===============================================================================================


def test_nothing_to_do(store: Store, worker: Worker, tables: Tables) -> None:
    """A healthy system is left as it is: living workers, their rows, jobs just published, ended jobs."""
    worker.claim(accept(store))
    worker.run(accept(store))
    store.mark_published([accept(store)])
    accept(store)
    before = tables.rows("SELECT * FROM jobs ORDER BY id"), tables.rows("SELECT * FROM workers")
    assert sweep(store) == Swept()
    assert (tables.rows("SELECT * FROM jobs ORDER BY id"), tables.rows("SELECT * FROM workers")) == before


def test_rows_of_a_dead_worker_return(store: Store, worker: Worker, tables: Tables) -> None:
    """A job whose worker died may run again at once; the attempt is charged, and it is to be published anew."""
    job_id = accept(store)
    store.mark_published([job_id])
    worker.claim(job_id)
    tables.end_lease(worker.id)
    swept = sweep(store)
    assert (swept.requeued, swept.lost) == (1, 0)
    assert published(swept) == {job_id}
    row = tables.job(job_id)
    assert (row["state"], row["token"], row["worker_id"], row["attempts"]) == ("queued", None, None, 1)
    assert tables.outcomes(job_id) == ["lost"]
    assert tables.count("ledger") == 0
    assert [one.state for one in worker.leases.list(live=False)] == [WorkerState.DEAD]
    assert Worker.hire(worker.database).claim(job_id).attempt == 2


def test_the_last_attempt_of_a_dead_worker_fails(store: Store, worker: Worker, tables: Tables) -> None:
    """With no attempt left the job fails, says why, and is charged only what earlier attempts have cost."""
    job_id = accept(store, max_attempts=2)
    worker.run(job_id, "retried", busy_seconds=1.25)
    worker.claim(job_id)
    tables.end_lease(worker.id)
    swept = sweep(store)
    assert (swept.lost, swept.requeued, swept.ended) == (1, 0, (job_id,))
    ended = store.get(job_id)
    assert ended.state is State.FAILED
    assert ended.error is not None
    assert (ended.error.code, ended.attempts) == ("worker_lost", 2)
    assert tables.outcomes(job_id) == ["retried", "lost"]
    assert tables.ledger(job_id)["busy_seconds"] == 1.25


def test_a_dead_workers_job_to_be_cancelled_is(store: Store, worker: Worker, tables: Tables) -> None:
    """A cancel whose worker died before it heard of it is recorded by the sweep, and charges nothing."""
    job_id = accept(store)
    worker.claim(job_id)
    store.cancel(job_id)
    tables.end_lease(worker.id)
    swept = sweep(store)
    assert (swept.lost, swept.requeued, swept.ended) == (1, 0, (job_id,))
    ended = store.get(job_id)
    assert (ended.state, ended.error) == (State.CANCELLED, None)
    assert tables.ledger(job_id)["busy_seconds"] == 0


def test_a_living_workers_rows_stay(store: Store, worker: Worker, database: Database, tables: Tables) -> None:
    """Only the dead one's rows are taken over, not those of one that drains."""
    draining = Worker.hire(database)
    kept = [worker.claim(accept(store)), draining.claim(accept(store))]
    draining.leases.drain(draining.id)
    dead = Worker.hire(database)
    taken = dead.claim(accept(store))
    tables.end_lease(dead.id)
    assert sweep(store).requeued == 1
    assert [tables.job(claim.id)["token"] for claim in kept] == [claim.token for claim in kept]
    assert tables.state(taken.id) is State.QUEUED


def test_a_draining_worker_dies_too(store: Store, worker: Worker, tables: Tables) -> None:
    """Who dies while draining is buried like any other."""
    job_id = accept(store)
    worker.claim(job_id)
    worker.leases.drain(worker.id)
    tables.end_lease(worker.id)
    assert sweep(store).requeued == 1


def test_bulk_rows_of_a_dead_worker_return(store: Store, batches: Batches, worker: Worker, tables: Tables) -> None:
    """Bulk rows go back to their backlog; no message is sent for a row."""
    batch = batches.open(new_id(), {})
    line = Line(1, "a", request_of(), 3)
    batches.take_in(batch, [line], [], start_offset=0, end_offset=1, last_line=1)
    worker.claim_bulk(1)
    tables.end_lease(worker.id)
    swept = sweep(store)
    assert (swept.requeued, swept.to_publish) == (1, ())
    [claim] = Worker.hire(worker.database).claim_bulk(5)
    assert claim.attempt == 2


def test_more_lost_rows_than_one_sweep_takes(
    store: Store, worker: Worker, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep takes a bounded number of rows; those out of attempts wait for the next one and are never requeued."""
    monkeypatch.setattr(jobs.store, "SWEEP_ROWS", 2)
    exhausted = [accept(store, max_attempts=1) for _ in range(3)]
    spare = [accept(store, max_attempts=2) for _ in range(3)]
    for job_id in exhausted + spare:
        worker.claim(job_id)
    tables.end_lease(worker.id)
    sweeps = [sweep(store) for _ in range(3)]
    assert [(swept.lost, swept.requeued) for swept in sweeps] == [(2, 2), (1, 1), (0, 0)]
    assert {tables.state(job_id) for job_id in exhausted} == {State.FAILED}
    assert {tables.state(job_id) for job_id in spare} == {State.QUEUED}


# == messages ===================================================================================================


def test_never_published_for_two_seconds(store: Store, tables: Tables) -> None:
    """A job whose message was never sent is published once it has waited 2 s, not before, and then is noted."""
    young, old = accept(store), accept(store, request_of(priority=1))
    tables.move_back(old, "run_after", 2.1)
    assert sweep(store).to_publish == (Waiting(old, MODEL, 1),)
    assert tables.job(old)["published_at"] is not None
    assert tables.job(young)["published_at"] is None
    assert sweep(store).to_publish == ()


def test_retries_are_published_when_due(store: Store, worker: Worker, tables: Tables) -> None:
    """A retry has no message: it is published as soon as its wait is over, and not earlier."""
    job_id = accept(store)
    worker.run(job_id, "retried", retry_after_seconds=30.0)
    assert sweep(store).to_publish == ()
    tables.move_back(job_id, "run_after", 31)
    assert published(sweep(store)) == {job_id}


def test_published_into_an_empty_queue(store: Store, tables: Tables) -> None:
    """A message sent 2 s ago whose queue is empty was lost; one that is still queued, or just sent, was not."""
    lost, fresh = accept(store), accept(store)
    other = accept(store, request_of(model="other"))
    store.mark_published([lost, fresh, other])
    for job_id in (lost, other):
        tables.move_back(job_id, "published_at", 2.1)
    assert sweep(store).to_publish == ()
    assert published(sweep(store, MODEL)) == {lost}
    assert sweep(store, MODEL).to_publish == ()
    assert published(sweep(store, MODEL, "other")) == {other}


@pytest.fixture
def overtaken(store: Store, worker: Worker, tables: Tables) -> UUID:
    """A job published 12 s ago, when one that was published just now has started."""
    job_id, later = accept(store), accept(store)
    store.mark_published([job_id, later])
    tables.move_back(job_id, "published_at", 12)
    worker.claim(later)
    return job_id


def test_overtaken_by_one_whose_message_was_not_noted(store: Store, worker: Worker, tables: Tables) -> None:
    """A job that starts at once never learns when its message went out: it was not before the job could start."""
    job_id, later = accept(store), accept(store)
    store.mark_published([job_id])
    tables.move_back(job_id, "published_at", 12)
    assert sweep(store).to_publish == ()
    worker.claim(later)
    assert published(sweep(store)) == {job_id}


def test_not_overtaken_by_one_that_waits_for_a_retry(store: Store, worker: Worker, tables: Tables) -> None:
    """When a job may start again says nothing of messages that are out now."""
    job_id, other = accept(store), accept(store)
    store.mark_published([job_id])
    tables.move_back(job_id, "published_at", 12)
    tables.move_back(other, "run_after", 12)
    worker.run(other, "retried", retry_after_seconds=30.0)
    assert sweep(store).to_publish == ()


def test_overtaken(store: Store, tables: Tables, overtaken: UUID) -> None:
    """A job is published again when one of its route and priority, published 10 s later, has started."""
    assert published(sweep(store)) == {overtaken}
    assert sweep(store).to_publish == ()


@pytest.mark.parametrize(
    "change",
    [
        "priority = 6",
        "model = 'other'",
        "published_at = published_at + interval '4 s'",
        "published_at = NULL",
        "run_after = now() + interval '1 hour'",
        "deadline_at = now() - interval '1 s'",
    ],
)
def test_not_overtaken(change: str, store: Store, tables: Tables, overtaken: UUID) -> None:
    """Of another priority or route, sent less than 10 s earlier, new, not due, or overdue: not published again."""
    tables.execute(f"UPDATE jobs SET {change} WHERE id = %s", overtaken)
    assert sweep(store).to_publish == ()


def test_overtaken_by_a_job_of_long_ago(store: Store, worker: Worker, tables: Tables, overtaken: UUID) -> None:
    """Only what started within the last minute proves that messages are being lost now."""
    tables.execute("UPDATE jobs SET started_at = now() - interval '2 minutes' WHERE state = 'running'")
    assert sweep(store).to_publish == ()


def test_only_queued_interactive_jobs_are_published(
    store: Store, batches: Batches, worker: Worker, tables: Tables
) -> None:
    """Running, ended and bulk rows want no message, however old they are."""
    worker.claim(accept(store))
    worker.run(accept(store))
    store.cancel(accept(store))
    batch = batches.open(new_id(), {})
    batches.take_in(batch, [Line(1, "a", request_of(), 3)], [], start_offset=0, end_offset=1, last_line=1)
    tables.execute("UPDATE jobs SET run_after = now() - interval '1 hour', published_at = now() - interval '1 hour'")
    assert sweep(store, MODEL).to_publish == ()


def test_urgent_jobs_are_published_first(store: Store, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are more than one sweep takes, the urgent ones and then the oldest go out first, each once."""
    monkeypatch.setattr(jobs.store, "SWEEP_ROWS", 2)
    jobs_made = [accept(store, request_of(priority=priority)) for priority in (9, 0, 5, 5)]
    for age, job_id in enumerate(reversed(jobs_made), start=3):
        tables.move_back(job_id, "run_after", age)
    late, urgent, middle_old, middle_new = jobs_made
    assert published(sweep(store)) == {urgent, middle_old}
    assert published(sweep(store)) == {middle_new, late}
    assert sweep(store).to_publish == ()


# == one at a time ==============================================================================================


def test_one_sweeper_at_a_time(store: Store, tables: Tables) -> None:
    """While one sweeps, another is told so and does nothing; afterwards it may."""
    job_id = accept(store)
    tables.move_back(job_id, "run_after", 5)
    with store.database._durable.begin() as other:
        other.execute(text("SELECT pg_advisory_xact_lock(hashtext('headrace.sweeper'))"))
        assert store.sweep([]) is None
    assert published(sweep(store)) == {job_id}


def test_sweepers_at_once_mend_each_row_once(store: Store, worker: Worker, tables: Tables) -> None:
    """Eight sweepers together requeue and publish every row exactly once."""
    made = [accept(store) for _ in range(20)]
    for job_id in made:
        worker.claim(job_id)
    tables.end_lease(worker.id)
    done = [swept for swept in all_at_once([partial(store.sweep, [])] * 8) if swept is not None]
    assert sum(swept.requeued for swept in done) == 20
    assert sorted(waiting.id for swept in done for waiting in swept.to_publish) == sorted(made)
    assert {len(tables.attempts(job_id)) for job_id in made} == {1}


def test_what_a_sweep_says() -> None:
    """One line of counts, without the ids."""
    swept = Swept(lost=1, requeued=2, expired=3, to_publish=(Waiting(new_id(), MODEL, 5),), ended=(new_id(),))
    assert swept.log_context() == {"lost": 1, "requeued": 2, "expired": 3, "abandoned": 0, "published_again": 1}
