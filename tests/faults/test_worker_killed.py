"""Workers that die, hang or wake up late: every job ends once, and what was read stays true."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self
from uuid import UUID

from jobs.leases import Worker
from jobs.schema import Job
from jobs.states import FINAL, State, WorkerState
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until
from kit.workers import START_SECONDS, WorkerProcesses

MANY = 1000
_ZOMBIE_LEASE_SECONDS = 4.0
PROMPT = "0123456789" * 5  # one second of the slow engine
LONG = PROMPT * 4


def test_a_thousand_jobs_outlive_a_worker_that_is_killed(system: System) -> None:
    """One worker is killed in the middle and a new one started: every job ends once, is billed once, and stays so."""
    with _Reader(system) as reader:
        # Long enough that a busy machine does not take a worker with so many threads for dead.
        lease = {"lease_seconds": 5.0}
        first = system.start("wide", **lease)
        submitted = _submit_mixed(system, MANY)
        wait_until(lambda: len(reader.seen) >= MANY // 4, PATIENCE_SECONDS, "a quarter has ended")
        with Recovery("a killed worker", within_seconds=15):
            first.kill()
            ended_before = dict(reader.seen)
            second = system.start("wide", **lease)
            wait_until(second.executions, PATIENCE_SECONDS, "the new worker works")
        system.await_all_ended()
        wait_until(lambda: len(reader.seen) == MANY, PATIENCE_SECONDS, "every end was read")

    at_the_end = {job.id: job for job in system.producer.list(limit=10 * MANY)}
    assert at_the_end.keys() == {job.id for job in submitted}
    assert [job for job in at_the_end.values() if job.state is not State.SUCCEEDED] == []
    assert at_the_end == reader.seen, "a result changed after it was first read"

    tables = system.tables
    assert tables.count("ledger") == tables.count("results") == MANY
    assert tables.value("SELECT count(DISTINCT job_id) FROM ledger") == MANY
    assert tables.value("SELECT count(*) FROM attempts WHERE ended_at IS NULL") == 0
    ends = "SELECT job_id FROM attempts WHERE outcome = 'succeeded' GROUP BY job_id HAVING count(*) = 1"
    assert len(tables.rows(ends)) == MANY

    executed = Counter(execution.job_id for worker in (first, second) for execution in worker.executions())
    assert {executed[job_id] for job_id in ended_before} == {1}
    lost = tables.value("SELECT count(*) FROM attempts WHERE outcome = 'lost'")
    assert 0 < lost < MANY // 4
    assert sum(executed.values()) <= MANY + lost


def test_a_worker_that_wakes_up_late_changes_nothing_and_goes_on_as_a_new_one(system: System) -> None:
    """A consumer frozen for three leases finds its job done by another; its own late result changes no row."""
    # A third one sweeps: frozen in the middle of that, a worker would hold the only sweeper's lock.
    workers = [system.launch("slow", lease_seconds=_ZOMBIE_LEASE_SECONDS, sweep_seconds=1000.0) for _ in range(2)]
    for worker in [*workers, system.launch("echo")]:
        worker.await_ready()
    job = system.producer.submit(model="slow", prompt=PROMPT * 2)
    zombie = wait_until(lambda: _who_has_begun(workers, job), PATIENCE_SECONDS, "one of them works on it")
    other = next(worker for worker in workers if worker is not zombie)
    consumer, identity = zombie.consumer, _just_renewed(zombie)

    zombie.supervisor.suspend()  # it would end a consumer that is silent for so long
    consumer.suspend()
    frozen_at = time.monotonic()
    first_read = system.wait(job.id)
    assert first_read.state is State.SUCCEEDED
    assert other.has_begun(job.id)
    other.kill()
    tables = system.tables
    before = _versions(system, job)
    thaws_at = frozen_at + 3 * _ZOMBIE_LEASE_SECONDS
    wait_until(lambda: time.monotonic() >= thaws_at, PATIENCE_SECONDS, "three leases are over")

    consumer.resume()
    reborn = wait_until(lambda: _lease_but(zombie, identity), PATIENCE_SECONDS, "the worker has a new lease")
    assert reborn.pid == consumer.pid
    zombie.supervisor.resume()
    assert tables.value("SELECT state FROM workers WHERE id = %s", identity) == WorkerState.DEAD
    next_job = system.wait(system.producer.submit(model="slow", prompt="next").id)
    assert next_job.state is State.SUCCEEDED
    assert zombie.has_begun(next_job.id)

    log = zombie.log.read_text()
    assert "came too late" in log or "stopping 1 jobs: fence" in log, "it tried to write, or knew better"
    assert system.producer.get(job.id) == first_read
    assert tables.outcomes(job.id) == ["lost", "succeeded"]
    assert _versions(system, job) == before


def test_a_killed_consumer_takes_its_lease_along(system: System) -> None:
    """However much of it was left: the next consumer under the same supervisor knows that the one before has ended."""
    worker = system.start("slow", lease_seconds=10 * PATIENCE_SECONDS)
    identity, job = worker.await_ready().id, _begun(system, worker, PROMPT)
    with Recovery("a killed consumer with a long lease", within_seconds=15):
        worker.consumer.kill()
        ended = system.wait(job.id)
    assert (ended.state, ended.text) == (State.SUCCEEDED, PROMPT)
    assert system.tables.outcomes(job.id) == ["lost", "succeeded"]
    assert worker.await_ready().id != identity


def test_jobs_whose_workers_die_under_them_end_as_lost_or_cancelled(system: System) -> None:
    """With no attempt left a job fails and says why; one that was to be cancelled is; neither is charged."""
    system.launch("echo")  # sweeps
    workers = [system.launch("slow") for _ in range(2)]
    doomed = system.producer.submit(model="slow", prompt=LONG, max_attempts=2)
    first = wait_until(lambda: _who_has_begun(workers, doomed), START_SECONDS, "one of them works on it")
    [second] = set(workers) - {first}
    first.kill()
    wait_until(lambda: second.has_begun(doomed.id), PATIENCE_SECONDS, "the other works on it")
    cancelled = _begun(system, second, LONG)
    second.consumer.suspend()
    system.producer.cancel(cancelled.id)
    second.kill()

    doomed, cancelled = system.wait(doomed.id), system.wait(cancelled.id)
    assert (doomed.state, doomed.attempts, doomed.text) == (State.FAILED, 2, "")
    assert doomed.error is not None
    assert doomed.error.code == "worker_lost"
    assert (cancelled.state, cancelled.attempts, cancelled.text) == (State.CANCELLED, 1, "")
    for job, outcomes in ((doomed, ["lost", "lost"]), (cancelled, ["lost"])):
        assert system.tables.outcomes(job.id) == outcomes
        assert job.cost is not None
        assert job.cost.token_dollars == job.cost.machine_dollars == 0


# == helpers =====================================================================================================


def _submit_mixed(system: System, count: int) -> list[Job]:
    """One in ten alone, the others in bulk."""
    bulk = system.producer.submit_many(_request(i) for i in range(count - count // 10))
    with ThreadPoolExecutor(4) as threads:
        single = threads.map(lambda i: system.producer.submit(**_request(i)), range(count // 10))
    return [*bulk, *single]


def _request(number: int) -> dict[str, Any]:
    return {"model": "wide", "prompt": f"{number:010d}"}


def _begun(system: System, worker: WorkerProcesses, prompt: str) -> Job:
    """A job that the engine works on."""
    job = system.producer.submit(model="slow", prompt=prompt)
    wait_until(lambda: worker.has_begun(job.id), PATIENCE_SECONDS, "the engine works on it")
    return job


def _who_has_begun(workers: list[WorkerProcesses], job: Job) -> WorkerProcesses | None:
    return next((worker for worker in workers if worker.has_begun(job.id)), None)


def _just_renewed(worker: WorkerProcesses) -> UUID:
    """The worker's id, right after a heartbeat: it is in the middle of no transaction now."""
    before = worker.await_ready().seconds_left

    def renewed() -> UUID | None:
        nonlocal before
        lease = worker.await_ready()
        before, earlier = lease.seconds_left, before
        return lease.id if lease.seconds_left > earlier else None

    return wait_until(renewed, PATIENCE_SECONDS, "a heartbeat")


def _versions(system: System, job: Job) -> list[dict[str, Any]]:
    """Which transaction wrote each row of the job, and where it lies: an UPDATE that changes nothing changes these."""
    version = "xmin::text AS writer, ctid::text AS place"
    found = system.tables.rows(f"SELECT {version} FROM jobs WHERE id = %s", job.id)
    for table in ("results", "ledger", "attempts"):
        found += system.tables.rows(f"SELECT {version} FROM {table} WHERE job_id = %s ORDER BY place", job.id)
    return found


def _lease_but(worker: WorkerProcesses, identity: UUID) -> Worker | None:
    lease = worker.lease()
    return lease if lease and lease.id != identity else None


class _Reader:
    """Reads every job again and again, and keeps each as it was when it was first seen to have ended."""

    def __init__(self, system: System) -> None:
        self.seen: dict[UUID, Job] = {}
        self._system = system
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._stop.wait(0.2):
            for job in self._system.producer.list(states=list(FINAL), limit=10 * MANY):
                self.seen.setdefault(job.id, job)
