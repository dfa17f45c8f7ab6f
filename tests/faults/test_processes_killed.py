"""One process of a worker is killed or hangs, or all of them at once: its jobs run again within 15 s of a kill.

The scenarios run at once, each with a worker of its own that has the default lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from jobs.schema import Job
from jobs.states import State
from kit.invariants import Witness
from kit.proxied import DEFAULTS, Behind, Scenario, side_by_side, standby
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until

PROMPT = "0123456789" * 5  # one second of the slow engine
LONG = PROMPT * 3  # what is killed under it has not ended when the last of them begins, however busy the machine
DRAIN_SECONDS = 5.0
_TO_EXIT_SECONDS = 2.0


def a_killed_engine_is_started_again_and_its_jobs_run_again(behind: Behind) -> None:
    """The engine's death costs jobs that ran side by side no attempt; consumer and supervisor stay."""
    worker, jobs = behind.worker, _begun(behind)
    consumer, supervisor, engine = worker.consumer, worker.supervisor, worker.engine
    with _run_again(jobs, behind, "a killed engine"):
        engine.kill()
    _assert_all_succeed(jobs, behind, ["released", "succeeded"])
    assert worker.engine != engine
    assert (worker.consumer, worker.supervisor) == (consumer, supervisor)


def an_engine_that_does_not_answer_is_killed_and_started_again(behind: Behind) -> None:
    """A frozen engine is noticed after a while; the worker keeps its lease meanwhile."""
    identity, engine = behind.worker.await_ready().id, behind.worker.engine
    jobs = _begun(behind)
    engine.suspend()
    wait_until(lambda: not engine.is_running(), PATIENCE_SECONDS, "the engine is killed")
    _assert_all_succeed(jobs, behind, ["released", "succeeded"])
    assert behind.worker.await_ready().id == identity


def a_killed_consumer_is_started_again_beside_the_same_engine(behind: Behind) -> None:
    """The consumer's death leaves the engine its model; the next one does not wait for the end of its lease."""
    worker, jobs = behind.worker, _begun(behind)
    consumer, engine = worker.consumer, worker.engine
    with _run_again(jobs, behind, "a killed consumer"):
        consumer.kill()
    _assert_all_succeed(jobs, behind, ["lost", "succeeded"])
    assert worker.consumer != consumer
    assert worker.engine == engine


def engine_and_consumer_end_with_their_killed_supervisor(behind: Behind) -> None:
    """The children end by themselves, and another worker does their jobs."""
    with standby(behind.system) as other:
        jobs = _begun(behind)
        with _run_again(jobs, behind, "a killed supervisor"):
            behind.worker.supervisor.kill()
            other.call()
        behind.worker.await_gone()
        _assert_all_succeed(jobs, behind, ["released", "succeeded"])


def jobs_of_a_worker_that_is_killed_as_a_whole_run_elsewhere(behind: Behind) -> None:
    """As when a machine is lost: nobody says goodbye, its lease ends, and another worker does its jobs."""
    with standby(behind.system) as other:
        jobs = _begun(behind)
        with _run_again(jobs, behind, "a killed worker"):
            behind.worker.kill()
            other.call()
        _assert_all_succeed(jobs, behind, ["lost", "succeeded"])


def a_consumer_that_drains_without_postgres_ends_in_time(behind: Behind) -> None:
    """Its supervisor is gone and Postgres silent: it can commit nothing, and ends after a drain and a lease."""
    jobs = _begun(behind)
    bound_seconds = DRAIN_SECONDS + DEFAULTS["lease_seconds"] + _TO_EXIT_SECONDS
    with Recovery("a drain without Postgres", within_seconds=bound_seconds):
        behind.database.silence()
        behind.worker.supervisor.kill()
        behind.worker.await_gone()
    behind.system.launch("slow")
    _assert_all_succeed(jobs, behind, ["lost", "succeeded"])


def an_engine_that_hangs_in_a_step_is_not_ready_and_its_jobs_run_again(behind: Behind) -> None:
    """A probe sees it within seconds; the engine is killed, and what it held goes back uncharged."""
    behind.await_shows_ready()
    with Witness(behind.system) as witness:
        neighbours = behind.begun(2, PROMPT)
        with Recovery("a hanging engine, until its jobs are queued", within_seconds=30):
            with Recovery("a hanging engine, until it is not ready", within_seconds=10):
                [culprit] = behind.submit(1, "!hang")
                behind.await_shows_unready()
            tables = behind.system.tables
            wait_until(lambda: "released" in tables.outcomes(neighbours[0].id), PATIENCE_SECONDS, "given back")
        behind.system.producer.cancel(culprit.id)  # it would hang again, alone
        witness.saw(culprit, *neighbours)
        witness.check()

    assert behind.system.producer.get(culprit.id).state is State.CANCELLED
    _assert_all_succeed(neighbours, behind, ["released", "succeeded"], PROMPT)


def a_job_that_kills_its_engine_each_time_fails_alone(behind: Behind) -> None:
    """It fails after three attempts and says why; those beside it finish and are charged for no attempt of theirs."""
    consumer = behind.worker.consumer
    with Witness(behind.system) as witness:
        neighbours = behind.begun(3, PROMPT)
        with Recovery("a job that kills its engine", within_seconds=90):
            [poison] = behind.submit(1, "!exit")
            later = behind.system.producer.submit_many([{"model": "slow", "prompt": PROMPT}] * 3)
            ended = behind.system.wait(poison.id)
        witness.saw(poison, *neighbours, *later)
        witness.check()

    assert (ended.state, ended.attempts) == (State.FAILED, 3)
    assert ended.error is not None
    assert ended.error.code == "engine_lost"
    assert behind.system.tables.outcomes(poison.id)[-3:] == ["retried", "retried", "failed"]
    others = [behind.system.producer.get(job.id) for job in [*neighbours, *later]]
    assert {(job.state, job.text, job.attempts) for job in others} == {(State.SUCCEEDED, PROMPT, 1)}
    assert behind.worker.consumer == consumer


# == helpers =====================================================================================================


def _begun(behind: Behind) -> list[Job]:
    """Two jobs alone and one in bulk, all of which the engine works on."""
    jobs = behind.submit(2, LONG) + behind.system.producer.submit_many([{"model": "slow", "prompt": LONG}])
    wait_until(lambda: behind.worker.has_begun(*(job.id for job in jobs)), PATIENCE_SECONDS, "they run")
    return jobs


@contextmanager
def _run_again(jobs: list[Job], behind: Behind, fault: str) -> Iterator[None]:
    """From the fault, which the block injects, until an engine works on every one of the jobs again."""
    with Recovery(fault, within_seconds=15):
        yield
        wait_until(lambda: all(_times_begun(job, behind) == 2 for job in jobs), PATIENCE_SECONDS, "they run again")


def _times_begun(job: Job, behind: Behind) -> int:
    return sum(one.job_id == job.id for worker in behind.system.workers for one in worker.executions())


def _assert_all_succeed(jobs: list[Job], behind: Behind, outcomes: list[str], text: str = LONG) -> None:
    """Each with its text and one bill, after attempts that ended like these."""
    ended = [behind.system.wait(job.id) for job in jobs]
    charged = len(outcomes) - outcomes.count("released")
    assert {(job.state, job.text, job.attempts) for job in ended} == {(State.SUCCEEDED, text, charged)}
    for job in jobs:
        assert behind.system.tables.outcomes(job.id) == outcomes
        assert behind.system.tables.ledger(job.id)["state"] == "succeeded"


# == all at once =================================================================================================

SCENARIOS: list[Scenario] = [
    a_killed_engine_is_started_again_and_its_jobs_run_again,
    an_engine_that_does_not_answer_is_killed_and_started_again,
    a_killed_consumer_is_started_again_beside_the_same_engine,
    engine_and_consumer_end_with_their_killed_supervisor,
    jobs_of_a_worker_that_is_killed_as_a_whole_run_elsewhere,
    a_consumer_that_drains_without_postgres_ends_in_time,
    an_engine_that_hangs_in_a_step_is_not_ready_and_its_jobs_run_again,
    a_job_that_kills_its_engine_each_time_fails_alone,
]


@pytest.fixture(scope="module")
def outcomes(new_system: Callable[..., System]) -> Iterator[dict[str, Future[None]]]:
    """How each scenario came out."""
    with side_by_side(SCENARIOS, new_system, drain_seconds=DRAIN_SECONDS) as outcomes:
        yield outcomes


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_recovery(outcomes: dict[str, Future[None]], scenario: str) -> None:
    """What the scenario's own sentence says."""
    outcomes[scenario].result()
