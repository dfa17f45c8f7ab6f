"""One job's life in SQL: each transition, and everything that guards it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from uuid import UUID, uuid4

import pytest
from psycopg.errors import CheckViolation
from sqlalchemy.exc import OperationalError

from jobs.database import Database
from jobs.errors import IdempotencyConflict, NotFound
from jobs.ids import new_id
from jobs.schema import Choice, JobError, JobRequest, Timings, Usage
from jobs.states import FINAL, Lane, State
from jobs.store import SUSPECT, Store
from kit.contract import MODEL, Tables, Worker, accept, request_of, settlement, turn_of

NOTHING_SPENT = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "busy_seconds": 0.0}


def spent(row: dict[str, object]) -> dict[str, object]:
    return {name: row[name] for name in NOTHING_SPENT}


# == the way through ============================================================================================


def test_life_of_a_job(store: Store, worker: Worker, tables: Tables) -> None:
    """Accepted, claimed and settled: the owner sees each step, and at the end the whole record."""
    asked = request_of(prompt="say it", max_tokens=7, metadata={"for": "me"}, priority=2)
    job_id = accept(store, asked, max_attempts=4)
    queued = store.get(job_id)
    assert (queued.state, queued.lane, queued.priority, queued.attempts) == (State.QUEUED, Lane.INTERACTIVE, 2, 0)
    assert (queued.max_attempts, queued.metadata) == (4, {"for": "me"})
    assert (queued.started_at, queued.finished_at, queued.cost) == (None, None, None)

    claim = worker.claim(job_id)
    running = store.get(job_id)
    assert (claim.request, claim.attempt, claim.max_attempts) == (asked, 1, 4)
    assert (running.state, running.worker_id, running.attempts) == (State.RUNNING, worker.id, 1)
    assert running.started_at is not None

    settled = worker.settle(
        claim,
        choices=(Choice(index=0, text="it", finish_reason="stop"), Choice(index=1, text="IT", finish_reason="length")),
        usage=Usage(prompt_tokens=11, cached_tokens=4, completion_tokens=5),
        timings=Timings(decode_seconds=0.5, time_to_first_token_seconds=0.1, busy_seconds=0.25),
        served_by="echo on cpu",
        token_dollars=Decimal("0.000000012345"),
        machine_dollars=Decimal("0.5"),
    )
    ended = store.get(job_id)
    assert settled.done == {job_id}
    assert (ended.state, ended.text, len(ended.choices), ended.worker_id) == (State.SUCCEEDED, "it", 2, None)
    assert ended.usage == Usage(prompt_tokens=11, cached_tokens=4, completion_tokens=5)
    assert ended.timings is not None
    assert ended.timings.decode_seconds == 0.5
    assert ended.served_by == "echo on cpu"
    assert ended.finished_at is not None
    assert ended.finished_at >= running.started_at
    assert ended.cost is not None
    assert (ended.cost.busy_seconds, ended.cost.machine_dollars) == (0.25, Decimal("0.5"))
    assert ended.cost.token_dollars == Decimal("0.000000012345")
    assert tables.outcomes(job_id) == ["succeeded"]
    assert tables.ledger(job_id)["state"] == "succeeded"


def test_payload_is_kept_byte_for_byte(store: Store, worker: Worker, tables: Tables) -> None:
    """Whatever text is asked and answered, a worker and an owner read exactly that, NUL characters too."""
    awkward = '\u0000 \U0001f600 \x01\x1f\x7f \u2028 "\\" \ufffd'
    request = request_of(prompt=awkward, metadata={"awkward": awkward})
    job_id = accept(store, request)
    assert tables.value("SELECT request::text FROM payloads WHERE job_id = %s", job_id) == request.payload()
    claim = worker.claim(job_id)
    assert claim.request == request
    worker.settle(claim, choices=(Choice(index=0, text=awkward, finish_reason="stop"),))
    ended = store.get(job_id)
    assert (ended.text, ended.metadata) == (awkward, {"awkward": awkward})


def test_error_that_quotes_anything_is_kept(store: Store, worker: Worker, tables: Tables) -> None:
    """A failure whose message holds a NUL or half a character ends its job like any other."""
    job_id = accept(store)
    worker.run(job_id, "failed", error=JobError(code="engine_error", message="bad \x00 and \ud800"))
    assert store.get(job_id).error == JobError(code="engine_error", message="bad \ufffd and ?")
    assert tables.attempts(job_id)[0]["error"] == "bad \ufffd and ?"


def test_deadline_counts_from_acceptance(store: Store, worker: Worker) -> None:
    """A claim says how long the job has waited and what is left until its deadline."""
    job_id = accept(store, request_of(deadline_seconds=100))
    claim = worker.claim(job_id)
    assert claim.seconds_left is not None
    assert 0 < claim.seconds_left <= 100
    assert claim.queue_seconds >= 0
    assert claim.queue_seconds + claim.seconds_left == pytest.approx(100, abs=0.001)


def test_queue_time_counts_from_when_it_could_start(store: Store, worker: Worker, tables: Tables) -> None:
    """Waiting in the queue is measured; waiting for a retry's time is not queueing."""
    job_id = accept(store)
    tables.move_back(job_id, "run_after", 30)
    assert worker.claim(job_id).queue_seconds == pytest.approx(30, abs=5)


# == claim ======================================================================================================


def test_claim_by_an_unknown_worker(store: Store, database: Database) -> None:
    """Who is not registered claims nothing."""
    job_id = accept(store)
    assert Worker(database).try_claim(job_id) is None
    assert store.get(job_id).state is State.QUEUED


@pytest.mark.parametrize("farewell", ["drain", "stop", "expired lease", "burial"])
def test_claim_by_a_worker_that_is_not_live(farewell: str, store: Store, worker: Worker, tables: Tables) -> None:
    """A worker that drains, has stopped, is late or is dead claims nothing."""
    job_id = accept(store)
    if farewell == "drain":
        worker.leases.drain(worker.id)
    elif farewell == "stop":
        worker.leases.stop(worker.id)
    else:
        tables.end_lease(worker.id)
    if farewell == "burial":
        store.sweep([])
    assert worker.try_claim(job_id) is None
    assert tables.attempts(job_id) == []
    assert store.get(job_id).state is State.QUEUED


def test_claim_of_an_unknown_job(worker: Worker) -> None:
    """A message about a job that does not exist leads nowhere."""
    assert worker.try_claim(uuid4()) is None


def test_claim_of_a_running_job(store: Store, worker: Worker, database: Database, tables: Tables) -> None:
    """A second message about a running job leads nowhere, to its own worker and to any other."""
    job_id = accept(store)
    claim = worker.claim(job_id)
    assert worker.try_claim(job_id) is None
    assert Worker.hire(database).try_claim(job_id) is None
    assert tables.job(job_id)["token"] == claim.token
    assert len(tables.attempts(job_id)) == 1


@pytest.mark.parametrize("outcome", sorted(FINAL))
def test_claim_of_an_ended_job(outcome: str, store: Store, worker: Worker) -> None:
    """Nothing runs a job again that has ended, however it ended."""
    job_id = accept(store)
    worker.run(job_id, outcome)
    assert worker.try_claim(job_id) is None


def test_claim_before_its_time(store: Store, worker: Worker, tables: Tables) -> None:
    """A retry's wait is kept; the same claim works when it is over."""
    job_id = accept(store)
    worker.run(job_id, "retried", retry_after_seconds=50.0)
    assert worker.try_claim(job_id) is None
    tables.move_back(job_id, "run_after", 51)
    assert worker.claim(job_id).attempt == 2


def test_claim_after_its_deadline(store: Store, worker: Worker, tables: Tables) -> None:
    """A job whose deadline has passed is not started any more."""
    job_id = accept(store, request_of(deadline_seconds=5))
    tables.move_back(job_id, "deadline_at", 5)
    assert worker.try_claim(job_id) is None


def test_claim_whose_reply_was_lost(
    store: Store, worker: Worker, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that was committed without the worker hearing of it is read back by the try after, as one attempt."""
    job_id = accept(store)
    lose_first_reply(store.database, monkeypatch)
    claim = worker.claim(job_id)
    assert (claim.attempt, claim.token) == (1, tables.job(job_id)["token"])
    assert len(tables.attempts(job_id)) == 1


def lose_first_reply(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next piece of work is done and committed, and then its connection fails."""
    honest = database.run
    lost: list[object] = []

    def run(work: Callable[..., object], **options: bool) -> object:
        def forgetful(connection: object) -> object:
            answer = work(connection)
            if not lost:
                lost.append(answer)
                raise OperationalError("lost", {}, Exception("the connection failed"))
            return answer

        return honest(forgetful, **options)

    monkeypatch.setattr(database, "run", run)


# == settle =====================================================================================================


def test_late_finish_changes_nothing(store: Store, worker: Worker, database: Database, tables: Tables) -> None:
    """A worker that was taken for dead settles under its old token: no row changes, and it hears that it was not."""
    job_id = accept(store)
    late = worker.claim(job_id)
    tables.end_lease(worker.id)
    store.sweep([])
    current = Worker.hire(database).claim(job_id)
    before = tables.job(job_id)
    assert worker.settle(late, busy_seconds=9.0).done == frozenset()
    assert tables.job(job_id) == before
    assert tables.count("results") == tables.count("ledger") == 0
    assert before["token"] == current.token
    assert tables.outcomes(job_id) == ["lost", None]


def test_settle_by_a_made_up_token(store: Store, worker: Worker, tables: Tables) -> None:
    """Without the token nothing is finished."""
    job_id = accept(store)
    claim = worker.claim(job_id)
    assert store.settle([replace(settlement(claim), token=uuid4())]).done == frozenset()
    assert tables.state(job_id) is State.RUNNING
    assert tables.count("ledger") == tables.count("results") == 0


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled", "expired", "retried", "released"])
def test_settling_twice_is_settling_once(outcome: str, store: Store, worker: Worker, tables: Tables) -> None:
    """A commit whose reply was lost is tried again: it reports done, and nothing is written or charged twice."""
    job_id = accept(store)
    claim = worker.claim(job_id)
    ends = outcome in FINAL
    first = worker.settle(claim, outcome, busy_seconds=2.0)
    once = tables.job(job_id), tables.attempts(job_id), tables.rows("SELECT * FROM results")
    second = worker.settle(claim, outcome, busy_seconds=2.0)
    assert first.done == second.done == {job_id}
    assert (tables.job(job_id), tables.attempts(job_id), tables.rows("SELECT * FROM results")) == once
    assert tables.count("ledger") == tables.count("results") == int(ends)
    assert [attempt["busy_seconds"] for attempt in tables.attempts(job_id)] == [2.0]


def test_settling_twice_in_one_group(store: Store, worker: Worker, tables: Tables) -> None:
    """The same settlement twice in one group commit is one end."""
    job_id = accept(store)
    claim = worker.claim(job_id)
    assert store.settle([settlement(claim), settlement(claim)]).done == {job_id}
    assert tables.count("ledger") == tables.count("results") == 1


def test_a_result_never_changes(store: Store, worker: Worker) -> None:
    """Another answer under the same token comes too late: the first one stands."""
    job_id = accept(store)
    claim = worker.run(job_id)
    first = store.get(job_id)
    worker.settle(claim, "failed")
    assert store.get(job_id) == first


def test_settling_many_ways_at_once(store: Store, worker: Worker, tables: Tables) -> None:
    """One group commit ends some jobs, requeues others and leaves a stranger's alone."""
    outcomes = ["succeeded", "failed", "retried", "released", "cancelled"]
    jobs = [accept(store) for _ in outcomes]
    claims = [worker.claim(job_id) for job_id in jobs]
    lost = accept(store)
    not_ours = worker.claim(lost)
    tables.execute("UPDATE jobs SET token = %s WHERE id = %s", uuid4(), lost)
    group = [settlement(claim, outcome) for claim, outcome in zip(claims, outcomes, strict=True)]
    assert store.settle([*group, settlement(not_ours)]).done == set(jobs)
    assert [tables.state(job_id) for job_id in jobs] == ["succeeded", "failed", "queued", "queued", "cancelled"]
    assert tables.state(lost) is State.RUNNING
    assert tables.count("ledger") == tables.count("results") == 3


def test_settling_nothing(store: Store) -> None:
    """An empty group is no error."""
    assert store.settle([]).done == frozenset()


def test_retry_returns_to_the_queue(store: Store, worker: Worker, tables: Tables) -> None:
    """A retried job waits for its time, is to be published anew, and its attempt is charged."""
    job_id = accept(store)
    store.mark_published([job_id])
    claim = worker.claim(job_id)
    started_at = tables.job(job_id)["started_at"]
    worker.settle(claim, "retried", retry_after_seconds=20.0)
    row = tables.job(job_id)
    assert (row["state"], row["token"], row["worker_id"], row["published_at"]) == ("queued", None, None, None)
    assert row["attempts"] == 1
    assert row["started_at"] == started_at
    wait = "SELECT extract(epoch FROM run_after - now())::float FROM jobs"
    assert tables.value(wait) == pytest.approx(20, abs=5)
    assert tables.outcomes(job_id) == ["retried"]
    assert tables.count("ledger") == tables.count("results") == 0


def test_release_is_not_charged(store: Store, worker: Worker, tables: Tables) -> None:
    """A job given back untouched may be claimed at once and has lost no attempt."""
    job_id = accept(store, max_attempts=1)
    worker.run(job_id, "released")
    assert tables.job(job_id)["attempts"] == 0
    assert tables.outcomes(job_id) == ["released"]
    assert worker.claim(job_id).attempt == 1


@pytest.mark.parametrize("outcome", ["retried", "released"])
def test_requeue_of_a_job_to_be_cancelled(outcome: str, store: Store, worker: Worker, tables: Tables) -> None:
    """A job whose cancel was asked for does not go back to the queue: it ends cancelled, with what it has cost."""
    job_id = accept(store)
    claim = worker.claim(job_id)
    store.cancel(job_id)
    partial = (Choice(index=0, text="hal", finish_reason="cancelled"),)
    assert worker.settle(claim, outcome, busy_seconds=1.5, choices=partial).done == {job_id}
    ended = store.get(job_id)
    assert (ended.state, ended.text, ended.error) == (State.CANCELLED, "hal", None)
    assert tables.ledger(job_id)["busy_seconds"] == 1.5
    assert tables.outcomes(job_id) == ["cancelled"]


def test_busy_seconds_are_the_sum_over_attempts(
    store: Store, worker: Worker, database: Database, tables: Tables
) -> None:
    """The bill holds the machine time of every attempt: retried, lost and last; tokens are billed once."""
    job_id = accept(store, max_attempts=5)
    worker.run(job_id, "retried", busy_seconds=1.0, machine_dollars=Decimal("0.1"))
    worker.run(job_id, "released", busy_seconds=0.0)
    mortal = Worker.hire(database)
    mortal.claim(job_id)
    tables.end_lease(mortal.id)
    store.sweep([])
    worker.run(job_id, "retried", busy_seconds=2.0, machine_dollars=Decimal("0.2"))
    worker.run(job_id, busy_seconds=4.0, machine_dollars=Decimal("0.4"), token_dollars=Decimal("0.03"))
    bill = tables.ledger(job_id)
    assert tables.outcomes(job_id) == ["retried", "released", "lost", "retried", "succeeded"]
    assert (bill["busy_seconds"], bill["machine_dollars"]) == (7.0, Decimal("0.7"))
    assert (bill["prompt_tokens"], bill["completion_tokens"], bill["token_dollars"]) == (3, 2, Decimal("0.03"))
    assert bill["busy_seconds"] == tables.value("SELECT sum(busy_seconds) FROM attempts")


# == cancel =====================================================================================================


def test_cancel_of_a_queued_job(store: Store, worker: Worker, tables: Tables) -> None:
    """A job that waits ends at once, with one ledger row of zeros and no attempt."""
    job_id = accept(store)
    assert store.cancel(job_id) == (State.CANCELLED, ())
    assert store.get(job_id).state is State.CANCELLED
    assert spent(tables.ledger(job_id)) == NOTHING_SPENT
    assert tables.attempts(job_id) == []
    assert worker.try_claim(job_id) is None


def test_cancel_of_a_running_job(store: Store, worker: Worker, tables: Tables) -> None:
    """A running job goes on until its worker stops it; asking twice is asking once."""
    job_id = accept(store)
    claim = worker.claim(job_id)
    assert store.cancel(job_id) == (State.RUNNING, ())
    asked_at = tables.job(job_id)["cancel_requested_at"]
    assert asked_at is not None
    assert store.cancel(job_id) == (State.RUNNING, ())
    assert tables.job(job_id)["cancel_requested_at"] == asked_at
    assert tables.count("ledger") == 0
    worker.settle(claim, "cancelled", busy_seconds=0.5)
    assert store.get(job_id).state is State.CANCELLED
    assert tables.ledger(job_id)["busy_seconds"] == 0.5


@pytest.mark.parametrize("outcome", sorted(FINAL))
def test_cancel_of_an_ended_job(outcome: str, store: Store, worker: Worker, tables: Tables) -> None:
    """An ended job stays as it is."""
    job_id = accept(store)
    worker.run(job_id, outcome)
    before = store.get(job_id)
    assert store.cancel(job_id) == (State(outcome), ())
    assert store.get(job_id) == before
    assert tables.count("ledger") == 1


def test_cancel_of_an_unknown_job(store: Store) -> None:
    """There is nothing to cancel."""
    with pytest.raises(NotFound):
        store.cancel(uuid4())


def test_job_that_succeeds_before_it_hears_of_its_cancel(store: Store, worker: Worker) -> None:
    """A cancel that comes too late loses: the result is there and stays."""
    job_id = accept(store)
    claim = worker.claim(job_id)
    store.cancel(job_id)
    assert worker.settle(claim).done == {job_id}
    assert store.get(job_id).state is State.SUCCEEDED


def test_one_ledger_row_of_zeros_for_what_never_ran(store: Store, worker: Worker, tables: Tables) -> None:
    """Cancelled while queued, cancelled while blocked, expired: each has its one row, and it costs nothing."""
    queued = accept(store)
    head = accept(store, turn_of("c"))
    blocked = accept(store, turn_of("c"))
    overdue = accept(store, request_of(deadline_seconds=1))
    tables.move_back(overdue, "deadline_at", 2)
    store.cancel(queued)
    store.cancel(blocked)
    swept = store.sweep([])
    assert swept is not None
    assert swept.ended == (overdue,)
    for job_id, state in [(queued, "cancelled"), (blocked, "cancelled"), (overdue, "expired")]:
        bill = tables.ledger(job_id)
        assert (bill["state"], spent(bill)) == (state, NOTHING_SPENT)
    assert tables.rows("SELECT * FROM ledger WHERE job_id = %s", head) == []


# == expire =====================================================================================================


def test_expiry_of_a_waiting_job(store: Store, tables: Tables) -> None:
    """A job that could not start in time ends expired and says why."""
    job_id = accept(store, request_of(deadline_seconds=1))
    in_time = accept(store, request_of(deadline_seconds=1000))
    tables.move_back(job_id, "deadline_at", 2)
    swept = store.sweep([])
    assert swept is not None
    assert (swept.expired, swept.ended) == (1, (job_id,))
    ended = store.get(job_id)
    assert ended.state is State.EXPIRED
    assert ended.error is not None
    assert ended.error.code == "deadline_exceeded"
    assert store.get(in_time).state is State.QUEUED


def test_a_running_job_is_not_expired_behind_its_worker(store: Store, worker: Worker, tables: Tables) -> None:
    """The deadline of a running job is its engine's business: the worker records it with what was spent."""
    job_id = accept(store, request_of(deadline_seconds=1))
    claim = worker.claim(job_id)
    tables.move_back(job_id, "deadline_at", 2)
    swept = store.sweep([])
    assert swept is not None
    assert swept.expired == 0
    worker.settle(claim, "expired", busy_seconds=1.0)
    assert tables.ledger(job_id)["busy_seconds"] == 1.0


# == idempotency, tenants =======================================================================================


def test_same_key_same_request(store: Store, tables: Tables) -> None:
    """Submitting again under a key gives the job of the first time, in the state it is in."""
    request = request_of(idempotency_key="k")
    first = store.accept(new_id(), request, 3)
    store.cancel(first.id)
    again = store.accept(new_id(), request, 3)
    assert (again.id, again.state, again.created) == (first.id, State.CANCELLED, False)
    assert first.created
    assert tables.count("jobs") == tables.count("payloads") == 1


def test_same_key_other_request(store: Store, tables: Tables) -> None:
    """A key that stands for another request is a conflict, and no job comes of it."""
    accept(store, request_of(idempotency_key="k"))
    with pytest.raises(IdempotencyConflict, match="idempotency_key"):
        accept(store, request_of(idempotency_key="k", prompt="other"))
    assert tables.count("jobs") == 1


def test_same_key_of_a_turn(store: Store, tables: Tables) -> None:
    """A turn that is submitted again takes no second number."""
    request = turn_of("c", idempotency_key="k")
    first = store.accept(new_id(), request, 3)
    assert store.accept(new_id(), request, 3).id == first.id
    assert tables.value("SELECT turns FROM conversations") == 1
    with pytest.raises(IdempotencyConflict):
        accept(store, turn_of("c", "other", idempotency_key="k"))
    assert tables.value("SELECT turns FROM conversations") == 1


@pytest.mark.parametrize("make", [request_of, lambda **fields: turn_of("c", **fields)])
def test_same_id_twice(make: Callable[..., JobRequest], store: Store, tables: Tables) -> None:
    """Submitting again with the same id is safe; with another request it is a conflict."""
    job_id = new_id()
    assert store.accept(job_id, make(), 3).created
    assert not store.accept(job_id, make(), 3).created
    with pytest.raises(IdempotencyConflict, match="id: "):
        store.accept(job_id, make(seed=1), 3)
    assert tables.count("jobs") == 1


def test_accept_whose_reply_was_lost(store: Store, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that was committed without the client hearing of it is found by the try after."""
    job_id = new_id()
    lose_first_reply(store.database, monkeypatch)
    assert store.accept(job_id, request_of(), 3).id == job_id
    assert tables.count("jobs") == 1


def test_keys_belong_to_a_tenant(store: Store) -> None:
    """Two tenants may use the same key for different requests."""
    one = accept(store, request_of(idempotency_key="k"), tenant="one")
    two = accept(store, request_of(idempotency_key="k", prompt="other"), tenant="two")
    assert one != two


def test_a_tenant_cannot_see_or_touch_anothers_job(store: Store) -> None:
    """To another tenant the job does not exist: neither to look at, nor to cancel, nor by its id."""
    job_id = accept(store, tenant="one")
    with pytest.raises(NotFound):
        store.get(job_id, "two")
    with pytest.raises(NotFound):
        store.cancel(job_id, "two")
    with pytest.raises(IdempotencyConflict):
        store.accept(job_id, request_of(), 3, "two")
    assert store.list("two") == []
    assert store.get(job_id, "one").state is State.QUEUED


def test_get_of_an_unknown_job(store: Store) -> None:
    """There is no such job."""
    with pytest.raises(NotFound):
        store.get(uuid4())


# == list, publish ==============================================================================================


def test_list_filters(store: Store, worker: Worker) -> None:
    """By state, by model, by conversation, and all of them together."""
    done = accept(store)
    worker.run(done)
    waiting = accept(store)
    other = accept(store, request_of(model="other"))
    turn = accept(store, turn_of("c"))

    def ids(**filters: object) -> set[UUID]:
        return {job.id for job in store.list(**filters)}  # type: ignore[arg-type]

    assert ids() == {done, waiting, other, turn}
    assert ids(states=[State.SUCCEEDED]) == {done}
    assert ids(states=[State.QUEUED]) == {waiting, other, turn}
    assert ids(states=[State.SUCCEEDED, State.QUEUED], model=MODEL) == {done, waiting, turn}
    assert ids(conversation="c") == {turn}
    assert ids(model=MODEL, conversation="c", states=[State.FAILED]) == set()
    assert ids(batch_id=uuid4()) == set()


def test_list_pages(store: Store) -> None:
    """Newest first, page by page, each job on one page."""
    made = [accept(store) for _ in range(7)]
    pages: list[list[UUID]] = [[]]
    for _ in range(4):
        pages.append([job.id for job in store.list(limit=3, before=pages[-1][-1] if pages[-1] else None)])
    assert [len(page) for page in pages[1:]] == [3, 3, 1, 0]
    assert [job_id for page in pages for job_id in page] == sorted(made, reverse=True)


def test_published_is_noted_once(store: Store, worker: Worker, tables: Tables) -> None:
    """The time of the message is that of the first, and none is noted on a job that runs or has ended."""
    job_id, running = accept(store), accept(store)
    store.mark_published([job_id])
    first = tables.job(job_id)["published_at"]
    worker.claim(running)
    store.mark_published([job_id, running, uuid4()])
    assert first is not None
    assert tables.job(job_id)["published_at"] == first
    assert tables.job(running)["published_at"] is None


def test_models_waiting(store: Store, worker: Worker) -> None:
    """The models that interactive jobs wait for, each once."""
    accept(store)
    worker.claim(accept(store))
    accept(store, request_of(model="other"))
    accept(store, request_of(model="other"))
    store.cancel(accept(store, request_of(model="gone")))
    assert sorted(store.models_waiting()) == [MODEL, "other"]


# == the database defends the contract ==========================================================================


@pytest.mark.parametrize(
    ("constraint", "change"),
    [
        ("jobs_state_known", "state = 'lost'"),
        ("jobs_lane_known", "lane = 'fast'"),
        ("jobs_finished_when_final", "state = 'succeeded'"),
        ("jobs_finished_when_final", "finished_at = now()"),
        ("jobs_held_when_running", "state = 'running', started_at = now()"),
        ("jobs_held_when_running", "token = gen_random_uuid(), worker_id = gen_random_uuid()"),
        ("jobs_held_when_running", "state = 'running', started_at = now(), token = gen_random_uuid()"),
        (
            "jobs_started_when_running",
            "state = 'running', token = gen_random_uuid(), worker_id = gen_random_uuid()",
        ),
        ("jobs_attempts_bounded", "attempts = max_attempts + 1"),
        ("jobs_attempts_bounded", "attempts = -1"),
        ("jobs_bulk_in_a_batch", "lane = 'bulk'"),
        ("jobs_line_in_a_batch", "line = 1"),
        ("jobs_turn_in_a_conversation", "conversation = 'c'"),
        ("jobs_turn_in_a_conversation", "turn = 1"),
        ("jobs_only_later_turns_block", "state = 'blocked', turn = 1, conversation = 'c'"),
    ],
)
def test_wrong_job_is_refused(constraint: str, change: str, store: Store, tables: Tables) -> None:
    """A hand-made row that breaks a promise is refused by the constraint that stands for it."""
    accept(store)
    with pytest.raises(CheckViolation, match=constraint):
        tables.execute(f"UPDATE jobs SET {change}")


@pytest.mark.parametrize(
    ("constraint", "statement"),
    [
        ("attempts_closed_once", "UPDATE attempts SET outcome = 'failed'"),
        ("attempts_closed_once", "UPDATE attempts SET ended_at = now()"),
        ("attempts_outcome_known", "UPDATE attempts SET ended_at = now(), outcome = 'forgotten'"),
        ("ledger_final", "INSERT INTO ledger (job_id, model, state) VALUES (gen_random_uuid(), 'm', 'running')"),
        ("workers_state_known", "UPDATE workers SET state = 'asleep'"),
        (
            "batches_finished_when_final",
            "INSERT INTO batches (id, state) VALUES (gen_random_uuid(), 'finished')",
        ),
        (
            "batches_finished_when_final",
            "INSERT INTO batches (id, state, finished_at) VALUES (gen_random_uuid(), 'running', now())",
        ),
        ("batches_state_known", "INSERT INTO batches (id, state) VALUES (gen_random_uuid(), 'asleep')"),
    ],
)
def test_wrong_row_is_refused(constraint: str, statement: str, store: Store, worker: Worker, tables: Tables) -> None:
    """So are wrong attempts, bills, workers and batches."""
    worker.claim(accept(store))
    with pytest.raises(CheckViolation, match=constraint):
        tables.execute(statement)


def test_a_job_whose_engine_died_among_others_is_a_suspect_from_then_on(store: Store, worker: Worker) -> None:
    """The claim after says so, to whichever worker; it was not charged, and a retry does not clear it."""
    job_id = accept(store)
    first = worker.claim(job_id)
    worker.settle(first, "released", error=JobError(code="engine_lost", message=SUSPECT))
    second = worker.claim(job_id)
    assert (first.suspect, second.suspect, second.attempt) == (False, True, 1)
    worker.settle(second, "retried")
    assert worker.claim(job_id).suspect
    assert not worker.claim(accept(store)).suspect
