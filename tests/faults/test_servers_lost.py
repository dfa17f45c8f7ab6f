"""Redis and Postgres that lose, freeze or come back: accepted jobs run, and run once."""

from __future__ import annotations

import random
import time

import psutil
import pytest
import redis

from headrace.servers import Servers
from jobs.schema import Job
from jobs.states import Lane, State, WorkerState
from kit.invariants import Witness
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, THREADS, System
from kit.waiting import wait_until
from kit.workers import WorkerProcesses

PROMPT = "0123456789" * 3  # six tenths of a second of the slow engine


@pytest.fixture(scope="module")
def worker(fragile_system: System) -> WorkerProcesses:
    """The one worker of all tests here."""
    worker = fragile_system.start("slow")
    _assert_all_succeed(fragile_system, _submit(fragile_system, 1))  # it consumes
    return worker


def test_queued_jobs_outlive_a_flush_of_redis(
    fragile_system: System, own_servers: Servers, worker: WorkerProcesses
) -> None:
    """Messages that FLUSHALL takes are sent again: every job runs, once."""
    jobs = _submit(fragile_system, THREADS + 8)
    wait_until(lambda: len(_in(fragile_system, State.RUNNING)) == THREADS, PATIENCE_SECONDS, "all threads are busy")
    assert fragile_system.producer.dispatcher.depth("slow", Lane.INTERACTIVE, PATIENCE_SECONDS) == 8
    with redis.Redis.from_url(own_servers.broker_url) as client:
        client.flushall()

    _assert_all_succeed(fragile_system, jobs)
    assert _executions(worker, jobs) == [1] * len(jobs)


@pytest.mark.parametrize("seconds", [4.0, pytest.param(60.0, marks=pytest.mark.soak)])
def test_bulk_and_interactive_jobs_outlive_a_redis_that_is_down(
    fragile_system: System, own_servers: Servers, worker: WorkerProcesses, seconds: float
) -> None:
    """While Redis is down submits succeed all the time and bulk rows drain; when it is back, what has waited runs."""
    identity = worker.await_ready().id
    with Witness(fragile_system) as witness:
        before = [*_submit(fragile_system, 3), *_submit_bulk(fragile_system, 10)]
        own_servers.redis.stop()
        meanwhile = _submit_every_second(fragile_system, seconds)
        bulk = [job for job in [*before, *meanwhile] if job.lane is Lane.BULK]
        _assert_all_succeed(fragile_system, bulk)
        waiting = [job for job in meanwhile if job.lane is Lane.INTERACTIVE]
        assert {fragile_system.producer.get(job.id).state for job in waiting} == {State.QUEUED}

        with Recovery(f"a Redis that was down for {seconds:g} s", within_seconds=30):
            own_servers.redis.start()
            wait_until(lambda: worker.has_begun(*(job.id for job in waiting)), PATIENCE_SECONDS, "all run")
        _assert_all_succeed(fragile_system, [*before, *meanwhile])
        witness.saw(*before, *meanwhile)
        witness.check()
    assert worker.await_ready().id == identity


def test_jobs_outlive_a_redis_that_is_killed_and_comes_back_empty(
    fragile_system: System, own_servers: Servers, worker: WorkerProcesses
) -> None:
    """No message is left: each waiting job is sent again, what runs runs on."""
    with Witness(fragile_system) as witness:
        jobs = _submit(fragile_system, THREADS + 8)
        wait_until(lambda: len(_in(fragile_system, State.RUNNING)) == THREADS, PATIENCE_SECONDS, "all threads are busy")
        own_servers.redis.kill()
        with Recovery("a Redis that came back empty", within_seconds=30):
            own_servers.redis.start()
            with redis.Redis.from_url(own_servers.broker_url) as client:
                client.flushall()
            _assert_all_succeed(fragile_system, jobs)
        witness.saw(*jobs)
        witness.check()


def test_a_silent_redis_costs_neither_lease_nor_bulk(
    fragile_system: System, own_servers: Servers, worker: WorkerProcesses
) -> None:
    """A Redis that keeps its connections and answers nothing stops no heartbeat and no bulk row."""
    identity = worker.await_ready().id
    frozen = psutil.Process(own_servers.redis.pid)
    frozen.suspend()
    try:
        jobs = _submit_bulk(fragile_system, 28)  # four seconds, more than a lease
        _assert_all_succeed(fragile_system, jobs)
        lease = worker.lease()
        assert lease is not None
        assert lease.id == identity
    finally:
        frozen.resume()


def test_a_worker_ends_cleanly_without_a_word_from_redis(fragile_system: System, own_servers: Servers) -> None:
    """SIGTERM while Redis is silent: running rows finish, no attempt is charged for nothing, and it says goodbye."""
    worker = fragile_system.start("other")
    identity = worker.await_ready().id
    frozen = psutil.Process(own_servers.redis.pid)
    frozen.suspend()
    try:
        jobs = _submit_bulk(fragile_system, 12, "other")  # nobody brings a message: a heartbeat sees them
        wait_until(worker.executions, PATIENCE_SECONDS, "the engine works")
        worker.begin_stop()
        assert worker.wait() == 0
    finally:
        frozen.resume()
        worker.close()

    after = [fragile_system.producer.get(job.id) for job in jobs]
    begun = {execution.job_id for execution in worker.executions()}
    assert {(job.state, job.attempts) for job in after if job.id in begun} == {(State.SUCCEEDED, 1)}
    assert {(job.state, job.attempts) for job in after if job.id not in begun} == {(State.QUEUED, 0)}
    assert fragile_system.tables.value("SELECT state FROM workers WHERE id = %s", identity) == WorkerState.STOPPED
    for job in jobs:  # nobody else would run them
        fragile_system.producer.cancel(job.id)


@pytest.mark.parametrize("pause_seconds", [0.0, 3.2], ids=["at-once", "after-the-lease"])
def test_no_accepted_job_is_lost_when_postgres_crashes(
    fragile_system: System, own_servers: Servers, worker: WorkerProcesses, pause_seconds: float
) -> None:
    """Postgres is killed while jobs run, and started again, within a lease or later: every job ends once."""
    jobs = [*_submit(fragile_system, 8), *_submit_bulk(fragile_system, 24)]
    earlier = len(_in(fragile_system, State.SUCCEEDED))
    wait_until(lambda: len(_in(fragile_system, State.SUCCEEDED)) >= earlier + 4, PATIENCE_SECONDS, "some have ended")
    first_read = {job.id: job for job in _in(fragile_system, State.SUCCEEDED)}

    own_servers.postgres.kill()
    down_at = time.monotonic()
    wait_until(lambda: time.monotonic() - down_at >= pause_seconds, PATIENCE_SECONDS, "the pause is over")
    own_servers.postgres.start()
    _assert_all_succeed(fragile_system, jobs)
    assert {job_id: fragile_system.producer.get(job_id) for job_id in first_read} == first_read


def test_jobs_outlive_sessions_that_are_ended_every_second(
    fragile_system: System, own_servers: Servers, worker: WorkerProcesses
) -> None:
    """Whatever Postgres was asked when the session ended is asked again, and is done once."""
    rounds = 4
    with Witness(fragile_system) as witness:
        for _ in range(rounds):
            due = time.monotonic() + 1.0
            witness.saw(*_submit(fragile_system, 3), *_submit_bulk(fragile_system, 6))
            wait_until(lambda due=due: time.monotonic() > due, PATIENCE_SECONDS, "a second is over")
            _end_sessions(fragile_system)
        with Recovery("sessions ended every second", within_seconds=60):
            witness.check()
    assert len(witness.first_read) >= 9 * rounds


_FIVE_MINUTES = pytest.param(300.0, (5.0, 20.0), marks=[pytest.mark.soak, pytest.mark.timeout(600)])


@pytest.mark.parametrize(("seconds", "pause_seconds"), [(5.0, (0.2, 1.0)), _FIVE_MINUTES])
def test_jobs_outlive_a_postgres_that_stops_and_starts(
    fragile_system: System,
    own_servers: Servers,
    worker: WorkerProcesses,
    seconds: float,
    pause_seconds: tuple[float, float],
) -> None:
    """Stopped at once, without a word to anybody, and started, again and again: no accepted job is lost."""
    chance = random.Random(7)
    until = time.monotonic() + seconds
    with Witness(fragile_system, claims_forgotten=True) as witness:
        while time.monotonic() < until:
            witness.saw(*_submit(fragile_system, 3), *_submit_bulk(fragile_system, 6))
            due = time.monotonic() + chance.uniform(*pause_seconds)
            wait_until(lambda due=due: time.monotonic() >= due, PATIENCE_SECONDS, "some seconds are over")
            own_servers.postgres.stop(immediate=True)
            own_servers.postgres.start()
        with Recovery("a Postgres that stops and starts", within_seconds=60):
            witness.check()


# == helpers =====================================================================================================


def _submit(system: System, count: int) -> list[Job]:
    return [system.producer.submit(model="slow", prompt=PROMPT) for _ in range(count)]


def _submit_bulk(system: System, count: int, model: str = "slow") -> list[Job]:
    return system.producer.submit_many({"model": model, "prompt": PROMPT} for _ in range(count))


def _submit_every_second(system: System, seconds: float) -> list[Job]:
    """A job alone and two in bulk each second, all of them accepted."""
    jobs: list[Job] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        due = time.monotonic() + 1.0
        jobs += [*_submit(system, 1), *_submit_bulk(system, 2)]
        wait_until(lambda due=due: time.monotonic() >= due, PATIENCE_SECONDS, "a second is over")
    return jobs


def _in(system: System, state: State) -> list[Job]:
    return system.producer.list(states=[state], limit=1000)


def _assert_all_succeed(system: System, jobs: list[Job]) -> None:
    """Each with its own text, one result and one bill."""
    ended = [system.wait(job.id) for job in jobs]
    assert {(job.state, job.text) for job in ended} == {(State.SUCCEEDED, PROMPT)}
    ids = [job.id for job in jobs]
    tables = system.tables
    assert tables.value("SELECT count(*) FROM ledger WHERE job_id = ANY(%s)", ids) == len(ids)
    ends = "SELECT count(*) FROM attempts WHERE job_id = ANY(%s) AND outcome = 'succeeded'"
    assert tables.value(ends, ids) == len(ids)


def _executions(worker: WorkerProcesses, jobs: list[Job]) -> list[int]:
    """How often the engine began each job."""
    executed = [execution.job_id for execution in worker.executions()]
    return [executed.count(job.id) for job in jobs]


def _end_sessions(system: System) -> None:
    """All of them but ours, as a failover or an administrator does."""
    others = "pid <> pg_backend_pid() AND datname = current_database()"
    system.tables.rows(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
