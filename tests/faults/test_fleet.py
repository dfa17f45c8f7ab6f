"""Several workers: a rolling restart, wrong clocks, and everything restarted at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from headrace.servers import Servers
from jobs.schema import Job
from jobs.states import State
from kit.invariants import Witness, check_memory
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, System, system_on
from kit.waiting import wait_until

PROMPT = "0123456789" * 3  # six tenths of a second of the slow engine
WAITING = 10_000
_FAKETIME = Path("/usr/lib") / (os.uname().machine + "-linux-gnu") / "faketime" / "libfaketime.so.1"


def test_a_rolling_restart_under_load_costs_no_attempt(system: System) -> None:
    """Each worker is stopped in turn and another started: what it runs it finishes, what it cannot it gives back."""
    with Witness(system) as witness, ExitStack() as end:
        workers = [system.start("slow", lease_seconds=10.0) for _ in range(2)]
        jobs: list[Job] = []
        for _ in range(2):
            jobs += [system.producer.submit(model="slow", prompt=PROMPT) for _ in range(16)]
            jobs += system.producer.submit_many({"model": "slow", "prompt": PROMPT} for _ in range(16))
            oldest = workers.pop(0)
            wait_until(oldest.executions, PATIENCE_SECONDS, "it works")
            workers.append(system.launch("slow", lease_seconds=10.0))
            oldest.begin_stop()
            end.callback(oldest.wait)
            workers[-1].await_ready()
        witness.saw(*jobs)
        witness.check()

    ended = [system.producer.get(job.id) for job in jobs]
    assert {(job.state, job.attempts) for job in ended} == {(State.SUCCEEDED, 1)}
    tables = system.tables
    assert {row["outcome"] for row in tables.rows("SELECT DISTINCT outcome FROM attempts")} <= {"succeeded", "released"}
    assert all(worker.wait() == 0 for worker in system.workers[:2])


@pytest.mark.skipif(not _FAKETIME.exists(), reason="libfaketime is not installed: apt-get install libfaketime")
def test_workers_whose_clocks_are_wrong_double_and_delay_nothing(system: System) -> None:
    """All times are the database's: leases hold, nobody is taken for dead, no message is sent too early or too late."""
    with Witness(system) as witness:
        # An engine that does not sleep: libfaketime spoils sleeps.
        wrong = [system.launch("echo", _shifted(offset), lease_seconds=10.0) for offset in ("+2h", "-2h")]
        right = system.launch("echo", lease_seconds=10.0)
        for worker in (*wrong, right):
            worker.await_ready()
        jobs = [system.producer.submit(model="echo", prompt=PROMPT, deadline_seconds=60) for _ in range(100)]
        jobs += system.producer.submit_many({"model": "echo", "prompt": PROMPT} for _ in range(1000))
        system.await_all_ended()
        right.begin_stop()
        right.wait()
        jobs += [system.producer.submit(model="echo", prompt=PROMPT, deadline_seconds=60) for _ in range(50)]
        witness.saw(*jobs)
        witness.check()
        assert all(worker.executions() for worker in wrong), "alone, they did the rest"
    ended = [system.producer.get(job.id) for job in jobs]
    assert {(job.state, job.error) for job in ended} == {(State.SUCCEEDED, None)}
    assert {tuple(system.tables.outcomes(job.id)) for job in jobs} == {("succeeded",)}
    assert system.tables.value("SELECT count(*) FROM workers WHERE state = 'dead'") == 0


def _shifted(offset: str) -> dict[str, str]:
    """What gives a process such a clock."""
    return {"LD_PRELOAD": str(_FAKETIME), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def test_a_load_that_comes_again_takes_no_more_memory(system: System) -> None:
    """I9: after the third identical load a worker's processes hold at most a tenth more than after the second."""
    worker = system.start("echo", lease_seconds=10.0)

    def load() -> None:
        system.producer.submit_many({"model": "echo", "prompt": PROMPT * 10} for _ in range(2000))
        for _ in range(200):
            system.producer.submit(model="echo", prompt=PROMPT * 10)
        system.await_all_ended()

    check_memory(worker.members, load)


@pytest.fixture
def fragile(fragile_servers: Servers, fragile_template: str, tmp_path: Path) -> Iterator[System]:
    """A system on servers that may be stopped."""
    fragile_servers.start()
    models = {"echo": {"engine": "echo", "slots": 64, "seconds_per_token": 0.02}}
    with system_on(fragile_servers, fragile_template, tmp_path, models=models) as system:
        yield system
        fragile_servers.start()


def test_ten_thousand_waiting_jobs_outlive_a_restart_of_everything(fragile: System, fragile_servers: Servers) -> None:
    """Servers and workers are killed at once and start at once: under the cap of connections, and steady in seconds."""
    with Witness(fragile, claims_forgotten=True) as witness:
        jobs = fragile.producer.submit_many({"model": "echo", "prompt": f"{n:04d}"} for n in range(WAITING - 500))
        jobs += [fragile.producer.submit(model="echo", prompt=f"{n:04d}") for n in range(500)]
        workers = [fragile.launch("echo", lease_seconds=10.0) for _ in range(2)]
        wait_until(lambda: len(witness.first_read) > 100, PATIENCE_SECONDS, "some have ended")
        for kill in (fragile_servers.redis.kill, fragile_servers.postgres.kill, *(worker.kill for worker in workers)):
            kill()
        ended = len(witness.first_read)
        with Recovery("a restart of everything, until it is steady", within_seconds=30):
            fragile_servers.start()
            workers = [fragile.launch("echo", lease_seconds=10.0) for _ in range(2)]
            for worker in workers:
                worker.await_ready()
            wait_until(lambda: len(witness.first_read) > ended + 1000, PATIENCE_SECONDS, "jobs end again")
        fragile.check_connections(len(workers))
        witness.saw(*jobs)
        witness.check(2 * PATIENCE_SECONDS)
    assert fragile.tables.value("SELECT count(*) FROM jobs WHERE state = 'succeeded'") == WAITING
