"""Many jobs from one file: taken in chunk by chunk, drained fairly, handed out in the order of the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from psycopg.errors import UniqueViolation
from sqlalchemy import Connection, text

import jobs.batches
from jobs.batches import Batch, Batches, Ended, Line, Progress, Rejection
from jobs.database import Database
from jobs.errors import NotFound
from jobs.ids import line_id, new_id
from jobs.schema import JobError, Usage
from jobs.states import BatchState, Lane, State
from jobs.store import Claim, Store
from kit.contract import Tables, Worker, request_of, settlement


def line(number: int, **fields: object) -> Line:
    return Line(number, f"line-{number}", request_of(prompt=f"prompt {number}", **fields), 3)


def rejection(number: int, custom_id: str | None = None) -> Rejection:
    return Rejection(number, custom_id, JobError(code="invalid_json", message=f"line {number} is bad"), "body")


def take_in(
    batches: Batches, batch: Batch, lines: list[Line], rejections: list[Rejection] | None = None, *, start: int = 0
) -> None:
    """A chunk of which every line has ten bytes."""
    size = len(lines) + len(rejections or ())
    end = start + 10 * size
    batches.take_in(batch, lines, rejections or [], start_offset=start, end_offset=end, last_line=end // 10)


@pytest.fixture
def batch(batches: Batches) -> Batch:
    return batches.open(new_id(), {"path": "in.jsonl"})


# == in =========================================================================================================


def test_open(batches: Batches) -> None:
    """A new batch knows its source and where its input stands; opening it again goes on with it."""
    batch_id = new_id()
    first = batches.open(batch_id, {"path": "in.jsonl", "bytes": 100})
    assert (first.state, first.source) == (BatchState.FILLING, {"path": "in.jsonl", "bytes": 100})
    assert (first.input_offset, first.input_lines, first.finished_at) == (0, 0, None)
    take_in(batches, first, [line(1)])
    batches.filled(batch_id)
    again = batches.open(batch_id, {"path": "other.jsonl"})
    assert (again.source, again.input_offset, again.input_lines) == (first.source, 10, 1)


def test_states_of_a_batch(batches: Batches, batch: Batch) -> None:
    """Filling, running, paused, filling again, finished; a finished batch is not opened again."""
    assert batches.get(batch.id).state is BatchState.FILLING
    batches.filled(batch.id)
    assert batches.get(batch.id).state is BatchState.RUNNING
    batches.pause(batch.id)
    batches.filled(batch.id)
    assert batches.get(batch.id).state is BatchState.PAUSED
    assert batches.open(batch.id, {}).state is BatchState.FILLING
    batches.finish(batch.id)
    finished = batches.get(batch.id)
    assert finished.state is BatchState.FINISHED
    assert finished.finished_at is not None
    for change in (batches.pause, batches.cancel, batches.filled):
        change(batch.id)
    assert batches.open(batch.id, {}) == finished


def test_a_batch_belongs_to_its_tenant(database: Database) -> None:
    """Another tenant neither sees it nor resumes it."""
    one, two = Batches(database, "one"), Batches(database, "two")
    batch = one.open(new_id(), {})
    one.pause(batch.id)
    with pytest.raises(NotFound):
        two.get(batch.id)
    with pytest.raises(NotFound):
        two.open(batch.id, {})
    assert one.get(batch.id).state is BatchState.PAUSED


def test_unknown_batch(batches: Batches) -> None:
    """There is no such batch."""
    with pytest.raises(NotFound):
        batches.get(uuid4())


def test_take_in(store: Store, batches: Batches, batch: Batch, tables: Tables) -> None:
    """A chunk's good lines become queued jobs of the bulk lane, its bad ones are kept, and the offset moves on."""
    asked = request_of(prompt="tab\t, newline\n, \\N, \u0000 and \U0001f600", priority=7, metadata={"a": "b"})
    good = Line(3, "of my own", asked, 9, endpoint="/v1/completions")
    batches.take_in(batch, [good], [rejection(4, "bad one")], start_offset=0, end_offset=321, last_line=4)
    job = store.get(line_id(batch.id, "of my own"))
    assert (job.state, job.lane, job.model, job.priority) == (State.QUEUED, Lane.BULK, "echo", 7)
    assert (job.max_attempts, job.batch_id, job.custom_id, job.metadata) == (9, batch.id, "of my own", {"a": "b"})
    assert tables.value("SELECT request::text FROM payloads") == asked.payload()
    assert (batches.get(batch.id).input_offset, batches.get(batch.id).input_lines) == (321, 4)
    assert batches.rejected(batch.id, 0) == [rejection(4, "bad one")]


def test_take_in_twice(batches: Batches, batch: Batch, tables: Tables) -> None:
    """A chunk whose commit's reply was lost is taken in again without effect."""
    for _ in range(2):
        take_in(batches, batch, [line(1), line(2)], [rejection(3)])
    assert (tables.count("jobs"), tables.count("payloads"), tables.count("rejections")) == (2, 2, 1)
    take_in(batches, batch, [line(4)], start=30)
    assert batches.get(batch.id).input_offset == 40
    assert tables.count("jobs") == 3


def test_take_in_all_or_nothing(batches: Batches, batch: Batch, tables: Tables) -> None:
    """A chunk that fails in the middle leaves no row, and the input stands where it stood."""
    take_in(batches, batch, [line(1)])
    with pytest.raises(UniqueViolation):
        take_in(batches, batch, [line(2), line(3)], [rejection(4), rejection(4)], start=10)
    with pytest.raises(UniqueViolation):
        take_in(batches, batch, [line(2), line(1)], start=10)
    assert (tables.count("jobs"), tables.count("payloads"), tables.count("rejections")) == (1, 1, 0)
    assert batches.get(batch.id).input_offset == 10
    take_in(batches, batch, [line(2)], start=10)
    assert tables.count("jobs") == 2


def break_connection(connection: Connection, tables: Tables, copy: Callable[[], None]) -> None:
    pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    tables.execute("SELECT pg_terminate_backend(%s, 10000)", pid)
    copy()


def wait_for_a_lock_in_vain(connection: Connection, tables: Tables, copy: Callable[[], None]) -> None:
    connection.execute(text("SET LOCAL lock_timeout = 50"))
    tables.execute("BEGIN")
    tables.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
    try:
        copy()
    finally:
        tables.execute("ROLLBACK")


@pytest.mark.parametrize("fault", [break_connection, wait_for_a_lock_in_vain])
def test_take_in_through_a_passing_fault(
    fault: Callable[..., None], batches: Batches, batch: Batch, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that passes, in the middle of a chunk, costs a second try, not the chunk."""
    honest = jobs.batches._insert
    tries: list[str] = []

    def faulty(connection: Connection, table: Any, rows: Sequence[tuple[object, ...]]) -> None:
        tries.append(table.name)
        copy = partial(honest, connection, table, rows)
        if len(tries) == 1:
            fault(connection, tables, copy)
        else:
            copy()

    monkeypatch.setattr(jobs.batches, "_insert", faulty)
    take_in(batches, batch, [line(1), line(2)], [rejection(3)])
    assert len(tries) == 1 + 3
    assert (tables.count("jobs"), tables.count("payloads"), tables.count("rejections")) == (2, 2, 1)
    assert batches.get(batch.id).input_lines == 3


def test_nothing_is_taken_into_a_finished_batch(batches: Batches, batch: Batch, tables: Tables) -> None:
    """What comes after the end is not taken in."""
    batches.cancel(batch.id)
    take_in(batches, batch, [line(1)], [rejection(2)])
    assert tables.count("jobs") == tables.count("rejections") == 0


def test_known(batches: Batches, batch: Batch) -> None:
    """Ids of lines taken in before are known, of good and bad ones; those of another batch are not."""
    take_in(batches, batch, [line(1), line(2)], [rejection(3, "bad")])
    other = batches.open(new_id(), {})
    take_in(batches, other, [line(4)])
    assert batches.known(batch.id, ["line-2", "line-4", "bad", "new"]) == {"line-2", "bad"}
    assert batches.known(batch.id, []) == set()


# == draining ===================================================================================================


def numbers(claims: list[Claim], tables: Tables) -> list[int]:
    return sorted(tables.job(claim.id)["line"] for claim in claims)


def tenants(claims: list[Claim]) -> Counter[str]:
    return Counter(claim.tenant_id for claim in claims)


def test_claim_by_priority_and_line(batches: Batches, batch: Batch, worker: Worker, tables: Tables) -> None:
    """Urgent lines go first, then those that stand further up."""
    take_in(batches, batch, [line(1), line(2, priority=9), line(3, priority=0), line(4), line(5)])
    assert numbers(worker.claim_bulk(1), tables) == [3]
    assert numbers(worker.claim_bulk(2), tables) == [1, 4]
    assert numbers(worker.claim_bulk(9), tables) == [2, 5]
    assert worker.claim_bulk(9) == []


def test_claims_are_whole(batches: Batches, batch: Batch, worker: Worker, tables: Tables) -> None:
    """Each claimed row has a token and an attempt of its own and says what to do."""
    take_in(batches, batch, [line(number) for number in range(1, 6)])
    claims = worker.claim_bulk(5)
    assert {claim.request.prompt for claim in claims} == {f"prompt {number}" for number in range(1, 6)}
    assert {claim.lane for claim in claims} == {Lane.BULK}
    assert len({claim.token for claim in claims}) == 5
    assert {claim.token for claim in claims} == {row["token"] for row in tables.rows("SELECT token FROM attempts")}
    assert {row["worker_id"] for row in tables.rows("SELECT worker_id FROM jobs")} == {worker.id}


def test_claim_of_one_route(batches: Batches, batch: Batch, worker: Worker) -> None:
    """A worker takes rows of its own model only, and no interactive job."""
    worker.store.accept(new_id(), request_of(), 3)
    take_in(batches, batch, [line(1, model="other"), line(2)])
    assert [claim.request.prompt for claim in worker.claim_bulk(9)] == ["prompt 2"]


def test_claim_is_fair_between_tenants(database: Database, worker: Worker) -> None:
    """Two tenants share a worker's room half and half, however many batches, rows or priorities each has."""
    small, large = Batches(database, "small"), Batches(database, "large")
    take_in(small, small.open(new_id(), {}), [line(number, priority=9) for number in range(1, 7)])
    for _ in range(3):
        take_in(large, large.open(new_id(), {}), [line(number, priority=0) for number in range(1, 21)])
    assert tenants(worker.claim_bulk(8)) == {"small": 4, "large": 4}
    assert tenants(worker.claim_bulk(8)) == {"small": 2, "large": 6}
    assert tenants(worker.claim_bulk(8)) == {"large": 8}


@pytest.mark.parametrize("state", ["paused", "finished", "cancelled"])
def test_only_open_batches_are_drained(state: str, batches: Batches, batch: Batch, worker: Worker) -> None:
    """The rows of a batch that is paused or over stay where they are."""
    take_in(batches, batch, [line(1)])
    {"paused": batches.pause, "finished": batches.finish, "cancelled": batches.cancel}[state](batch.id)
    assert worker.claim_bulk(9) == []


def test_a_paused_batch_goes_on(batches: Batches, batch: Batch, worker: Worker) -> None:
    """Opened again, its rows are drained while it is still being filled."""
    take_in(batches, batch, [line(1), line(2)])
    batches.pause(batch.id)
    batches.open(batch.id, {})
    assert len(worker.claim_bulk(1)) == 1
    batches.filled(batch.id)
    assert len(worker.claim_bulk(9)) == 1


def test_bulk_claim_by_a_worker_that_is_not_live(batches: Batches, batch: Batch, worker: Worker) -> None:
    """A draining or unknown worker takes no row."""
    take_in(batches, batch, [line(1)])
    assert Worker(worker.database).claim_bulk(9) == []
    worker.leases.drain(worker.id)
    assert worker.claim_bulk(9) == []


def test_retried_rows_wait_for_their_time(batches: Batches, batch: Batch, worker: Worker, tables: Tables) -> None:
    """A retried row is left out until its wait is over."""
    take_in(batches, batch, [line(1), line(2)])
    [claim] = worker.claim_bulk(1)
    worker.settle(claim, "retried", retry_after_seconds=60.0)
    assert numbers(worker.claim_bulk(9), tables) == [2]
    tables.move_back(claim.id, "run_after", 61)
    [again] = worker.claim_bulk(9)
    assert (again.id, again.attempt) == (claim.id, 2)


def test_deadlines_of_lines(store: Store, batches: Batches, batch: Batch, worker: Worker, tables: Tables) -> None:
    """A line's deadline counts from when it was taken in; overdue it is not claimed but expires."""
    take_in(batches, batch, [line(1), line(2, deadline_seconds=100), line(3, deadline_seconds=100)])
    overdue = line_id(batch.id, "line-2")
    tables.move_back(overdue, "deadline_at", 101)
    left = {claim.request.prompt: claim.seconds_left for claim in worker.claim_bulk(9)}
    assert left == {"prompt 1": None, "prompt 3": pytest.approx(100, abs=10)}
    store.sweep([])
    assert tables.state(overdue) is State.EXPIRED


def test_cancel_of_a_batch(
    batches: Batches, batch: Batch, worker: Worker, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting rows end at once, running ones are to be stopped, ended ones stay, and each has one ledger row."""
    monkeypatch.setattr(jobs.batches, "CANCEL_ROWS", 2)
    take_in(batches, batch, [line(number) for number in range(1, 8)])
    done, running = worker.claim_bulk(2)
    worker.settle(done)
    for _ in range(2):
        batches.cancel(batch.id)
    assert batches.progress(batch.id).states == {State.SUCCEEDED: 1, State.RUNNING: 1, State.CANCELLED: 5}
    assert worker.renew([running.token]).cancelled == (running.token,)
    worker.settle(running, "cancelled")
    assert tables.count("ledger") == 7


# == out ========================================================================================================


def run_some(batches: Batches, batch: Batch, worker: Worker) -> None:
    """Of ten lines: two bad, five succeeded, one failed, two still waiting."""
    good = [line(number) for number in (1, 2, 3, 5, 6, 7, 8, 10)]
    take_in(batches, batch, good, [rejection(4), rejection(9, "nine")])
    claims = sorted(worker.claim_bulk(6), key=lambda claim: int(str(claim.request.prompt).split()[1]))
    ends = [
        settlement(
            claim,
            "failed" if at == 2 else "succeeded",
            busy_seconds=0.5,
            usage=Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=at),
        )
        for at, claim in enumerate(claims)
    ]
    worker.store.settle(ends[::-1])


def test_progress(batches: Batches, batch: Batch, worker: Worker) -> None:
    """A batch says how many of its lines are in which state; rejected lines have ended and failed."""
    assert batches.progress(batch.id) == Progress({}, 0)
    run_some(batches, batch, worker)
    progress = batches.progress(batch.id)
    assert progress.states == {State.SUCCEEDED: 5, State.FAILED: 1, State.QUEUED: 2}
    assert (progress.rejected, progress.total, progress.ended, progress.failed) == (2, 10, 8, 3)


def test_models(batches: Batches, batch: Batch, worker: Worker) -> None:
    """The models that a batch still waits for."""
    take_in(batches, batch, [line(1), line(2, model="b"), line(3, model="a"), line(4, model="b")])
    [claim] = worker.claim_bulk(9)
    assert batches.models(batch.id) == ["a", "b", "echo"]
    worker.settle(claim)
    assert batches.models(batch.id) == ["a", "b"]


def test_summary(batches: Batches, batch: Batch, worker: Worker, tables: Tables) -> None:
    """What a batch came to: all that was spent, and how long the rows that succeeded took."""
    run_some(batches, batch, worker)
    tables.execute("UPDATE jobs SET started_at = finished_at - interval '2 s' WHERE state = 'succeeded'")
    tables.execute("UPDATE jobs SET started_at = finished_at - interval '9 s' WHERE state = 'failed'")
    summary = batches.summary(batch.id)
    assert (summary.succeeded, summary.busy_seconds) == (5, 3.0)
    assert (summary.prompt_tokens, summary.cached_tokens, summary.completion_tokens) == (60, 24, 0 + 1 + 2 + 3 + 4 + 5)
    assert (summary.latency_p50_seconds, summary.latency_p95_seconds) == (2.0, 2.0)
    assert summary.first_started_at is not None
    assert summary.last_finished_at is not None
    assert (summary.last_finished_at - summary.first_started_at).total_seconds() == 9.0


def test_summary_of_nothing(batches: Batches, batch: Batch) -> None:
    """Before anything ran there is nothing to sum up, and that is no error."""
    summary = batches.summary(batch.id)
    assert (summary.succeeded, summary.prompt_tokens, summary.busy_seconds) == (0, 0, 0.0)
    assert summary.latency_p50_seconds is None
    assert summary.first_started_at is None


def outputs(batches: Batches, batch: Batch) -> list[Ended]:
    """Every page, to the last line."""
    jobs: list[Ended] = []
    after, lines = 0, batches.get(batch.id).input_lines
    while after < lines:
        page = batches.outputs(batch.id, after)
        assert page is not None
        jobs += page.jobs
        after = page.last
    return jobs


@pytest.mark.parametrize("page", [1, 3, 5, 10, 500])
def test_outputs(page: int, batches: Batches, batch: Batch, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ended row comes out once in the order of the input, and every bad line, whatever is read at a time."""
    monkeypatch.setattr(jobs.batches, "READ_LINES", page)
    run_some(batches, batch, worker)
    for claim in worker.claim_bulk(2):
        worker.settle(claim)
    ended = outputs(batches, batch)
    assert [job.line for job in ended] == [1, 2, 3, 5, 6, 7, 8, 10]
    assert [job.line for job in ended if job.state != "succeeded"] == [3]
    assert [bad.number for bad in batches.rejected(batch.id, 0)] == [4, 9][:page]
    assert [bad.number for bad in batches.rejected(batch.id, 4)] == [9]
    assert batches.rejected(batch.id, 9) == []
    assert [job.custom_id for job in ended] == [f"line-{job.line}" for job in ended]


def test_outputs_come_when_all_before_them_have_ended(
    batches: Batches, batch: Batch, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is read once every row of it has ended, however many of the next one have; never more than a page."""
    monkeypatch.setattr(jobs.batches, "READ_LINES", 2)
    take_in(batches, batch, [line(number) for number in range(1, 5)])
    first, *others = sorted(worker.claim_bulk(4), key=lambda claim: str(claim.request.prompt))
    for claim in others:
        worker.settle(claim)
    assert batches.outputs(batch.id, 0) is None
    later = batches.outputs(batch.id, 2)
    assert later is not None
    assert ([job.line for job in later.jobs], later.last) == ([3, 4], 4)
    worker.settle(first)
    page = batches.outputs(batch.id, 0)
    assert page is not None
    assert ([job.line for job in page.jobs], page.last) == ([1, 2], 2)


def test_batches_do_not_mix(batches: Batches, batch: Batch, worker: Worker) -> None:
    """Each batch has its own rows, ids, rejections and sums."""
    other = batches.open(new_id(), {})
    take_in(batches, other, [line(1)], [rejection(2)])
    run_some(batches, batch, worker)
    assert batches.progress(other.id).total == 2
    assert len(batches.rejected(other.id, 0)) == 1
    assert line_id(other.id, "line-1") != line_id(batch.id, "line-1")
