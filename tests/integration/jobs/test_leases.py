"""Proofs of life: who has one, who has lost it, and what a worker learns at each heartbeat."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID, uuid4

import pytest

from jobs.batches import Batches, Line
from jobs.database import Database
from jobs.errors import Fenced
from jobs.figures import Figures, Gpu, Latencies, Process
from jobs.ids import new_id
from jobs.leases import Leases, Load
from jobs.states import State, WorkerState
from jobs.store import Store
from kit.contract import LEASE_SECONDS, MODEL, Tables, Worker, accept, request_of


def test_register(database: Database) -> None:
    """A new worker is live for one lease, and others see what it said of itself."""
    leases, worker_id = Leases(database, 7.0), uuid4()
    leases.register(worker_id, model=MODEL, host="here", pid=42, slots=8, info='{"device": "cpu"}')
    [worker] = leases.list()
    assert (worker.id, worker.state, worker.model) == (worker_id, WorkerState.LIVE, MODEL)
    assert (worker.host, worker.pid, worker.slots, worker.info) == ("here", 42, 8, {"device": "cpu"})
    assert (worker.running, worker.ready) == (0, True)
    assert worker.seconds_left == pytest.approx(7, abs=3)


def test_register_twice(worker: Worker, database: Database) -> None:
    """A registration whose reply was lost is repeated without harm."""
    worker.leases.register(worker.id, model=MODEL, host="there", pid=2, slots=1, info="{}")
    [only] = worker.leases.list()
    assert (only.id, only.host) == (worker.id, "here")


def test_renew(worker: Worker, tables: Tables) -> None:
    """A heartbeat begins the lease anew and notes the load."""
    tables.execute("UPDATE workers SET lease_until = now() + interval '1 s'")
    renewal = worker.leases.renew(worker.id, Load(running=3, ready=False, busy_seconds=1.5, refused_messages=2), [])
    [seen] = worker.leases.list()
    assert (seen.running, seen.ready, seen.busy_seconds, seen.refused_messages) == (3, False, 1.5, 2)
    assert seen.seconds_left == pytest.approx(LEASE_SECONDS, abs=3)
    assert (renewal.cancelled, renewal.backlog) == ((), False)


def test_what_a_worker_tells_of_itself(worker: Worker) -> None:
    """It is read as it was written, beside what was said at first, and stands until there is something newer."""
    latencies = Latencies()
    for seconds in (0.001, 0.3, 5_000.0):
        latencies.job.note(seconds)
    told = Figures(
        {"engine": Process(cpu_seconds=2.5, cpu_cores=0.5, resident_bytes=1 << 30)},
        Gpu("H200", 0.97, 1 << 30, 1 << 37),
        steps=7,
        latencies={"bulk": latencies},
    )
    [before] = worker.leases.list()
    assert before.figures == Figures()
    for figures in (told, None):
        worker.leases.renew(worker.id, Load(running=0, ready=True, busy_seconds=0.0, figures=figures), [])
        [seen] = worker.leases.list()
        assert (seen.figures, seen.info) == (told, before.info)


def test_renew_after_the_end_of_the_lease(worker: Worker, tables: Tables) -> None:
    """A late worker whom nobody has buried yet may go on: its rows are still its own."""
    tables.end_lease(worker.id)
    worker.renew()
    assert [one.id for one in worker.leases.list()] == [worker.id]


@pytest.mark.parametrize("end", ["burial", "farewell", "never registered"])
def test_renew_is_refused(end: str, store: Store, worker: Worker, tables: Tables) -> None:
    """Who was buried, has said goodbye, or was never there is fenced, and stays so."""
    if end == "burial":
        tables.end_lease(worker.id)
        store.sweep([])
    elif end == "farewell":
        worker.leases.stop(worker.id)
    else:
        worker = Worker(worker.database)
    for _ in range(2):
        with pytest.raises(Fenced):
            worker.renew()


def test_nothing_leads_back_to_life(store: Store, worker: Worker, tables: Tables) -> None:
    """A buried worker is neither drained nor registered again into life."""
    tables.end_lease(worker.id)
    store.sweep([])
    worker.leases.drain(worker.id)
    worker.leases.register(worker.id, model=MODEL, host="here", pid=1, slots=4, info="{}")
    [only] = worker.leases.list(live=False)
    assert only.state is WorkerState.DEAD
    assert worker.leases.list() == []


def test_drain_and_stop(store: Store, worker: Worker) -> None:
    """A draining worker keeps its lease and its rows; a stopped one is gone from the list of the living."""
    claim = worker.claim(accept(store))
    worker.leases.drain(worker.id)
    worker.renew([claim.token])
    assert [one.state for one in worker.leases.list()] == [WorkerState.DRAINING]
    assert worker.settle(claim).done == {claim.id}
    worker.leases.stop(worker.id)
    assert worker.leases.list() == []
    assert [one.state for one in worker.leases.list(live=False)] == [WorkerState.STOPPED]


@pytest.mark.parametrize(("end", "state"), [(Leases.stop, WorkerState.STOPPED), (Leases.bury, WorkerState.DEAD)])
def test_what_a_worker_left_that_is_known_to_be_gone_is_swept_at_once(
    end: Callable[[Leases, UUID], None], state: WorkerState, store: Store, worker: Worker
) -> None:
    """One that says goodbye with rows in its hands, or whose process has ended: nobody waits for its lease."""
    job_id = accept(store)
    worker.claim(job_id)
    end(worker.leases, worker.id)
    swept = store.sweep([])
    assert swept is not None
    assert swept.requeued == 1
    assert store.get(job_id).state is State.QUEUED
    assert [one.state for one in worker.leases.list(live=False)] == [state]


def test_who_has_said_goodbye_is_not_buried(worker: Worker) -> None:
    """It did not die."""
    worker.leases.stop(worker.id)
    worker.leases.bury(worker.id)
    assert [one.state for one in worker.leases.list(live=False)] == [WorkerState.STOPPED]


def test_renew_tells_of_cancels(store: Store, worker: Worker, database: Database) -> None:
    """A heartbeat names the tokens of the worker's own running rows that were to be cancelled."""
    claims = [worker.claim(accept(store)) for _ in range(3)]
    strange = Worker.hire(database).claim(accept(store))
    for claim in (claims[1], strange):
        store.cancel(claim.id)
    held = [claim.token for claim in claims]
    assert worker.renew(held).cancelled == (claims[1].token,)
    worker.settle(claims[1], "cancelled")
    assert worker.renew(held).cancelled == ()


def test_unheld_rows_are_given_back_after_a_lease(store: Store, worker: Worker, tables: Tables) -> None:
    """A row that the worker does not hold, its claim's reply being lost, returns uncharged, but not while young."""
    job_id = accept(store)
    store.mark_published([job_id])
    lost = worker.claim(job_id)
    held = worker.claim(accept(store))
    worker.renew([held.token])
    assert tables.state(job_id) is State.RUNNING

    tables.execute("UPDATE attempts SET started_at = started_at - make_interval(secs => %s)", LEASE_SECONDS + 1)
    worker.renew([held.token])
    row = tables.job(job_id)
    assert (row["state"], row["attempts"], row["published_at"]) == ("queued", 0, None)
    assert tables.outcomes(job_id) == ["released"]
    assert tables.state(held.id) is State.RUNNING
    assert worker.claim(job_id).token != lost.token


def test_other_workers_rows_are_not_given_back(
    store: Store, worker: Worker, database: Database, tables: Tables
) -> None:
    """A worker speaks for its own rows alone."""
    claim = Worker.hire(database).claim(accept(store))
    tables.execute("UPDATE attempts SET started_at = started_at - interval '1 hour'")
    worker.renew()
    assert tables.job(claim.id)["token"] == claim.token


def test_backlog(store: Store, batches: Batches, worker: Worker) -> None:
    """A heartbeat says whether rows of open batches wait for the worker's model, and only those."""
    accept(store)
    batch = batches.open(new_id(), {})
    other = Line(1, "a", request_of(model="other"), 3)
    batches.take_in(batch, [other], [], start_offset=0, end_offset=1, last_line=1)
    assert not worker.renew().backlog
    ours = Line(2, "b", request_of(), 3)
    batches.take_in(batch, [ours], [], start_offset=1, end_offset=2, last_line=2)
    assert worker.renew().backlog
    batches.pause(batch.id)
    assert not worker.renew().backlog
    batches.open(batch.id, {})
    assert worker.renew().backlog
    [claim] = worker.claim_bulk(10)
    assert not worker.renew([claim.token]).backlog


def test_list_is_newest_first(database: Database, tables: Tables) -> None:
    """The newest worker comes first; those whose lease is over are left out, unless asked for."""
    old, new = Worker.hire(database), Worker.hire(database)
    tables.execute("UPDATE workers SET started_at = started_at - interval '1 s' WHERE id = %s", old.id)
    assert [one.id for one in old.leases.list()] == [new.id, old.id]
    tables.end_lease(new.id)
    assert [one.id for one in old.leases.list()] == [old.id]
    late = old.leases.list(live=False)[0]
    assert late.id == new.id
    assert late.seconds_left < 0
