"""Engines that die or hang under a job: the culprit fails, its neighbours do not, and none of them pays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jobs.schema import Job
from jobs.states import State
from kit.invariants import Witness
from kit.proxied import DEFAULTS
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until
from kit.workers import WorkerProcesses

PROMPT = "0123456789" * 3  # six tenths of a second of the slow engine


@pytest.fixture(scope="module")
def steady(new_system: Callable[..., System]) -> System:
    """With the defaults, one worker whose engine does what prompts ask of it, and is through its first steps."""
    system = new_system(**DEFAULTS)
    system.start("faulty")
    system.wait(_submit(system, PROMPT).id)
    return system


@pytest.fixture
def worker(steady: System) -> WorkerProcesses:
    """That worker."""
    return steady.workers[0]


def test_an_engine_that_hangs_in_a_step_is_not_ready_and_its_jobs_run_again(
    steady: System, worker: WorkerProcesses
) -> None:
    """With the defaults: a probe sees it within seconds; the engine is killed, and what it held goes back uncharged."""
    wait_until(lambda: worker.shows_ready, PATIENCE_SECONDS, "the worker is ready")
    with Witness(steady) as witness:
        neighbours = [_submit(steady, PROMPT) for _ in range(2)]
        ids = [job.id for job in neighbours]
        wait_until(lambda: worker.has_begun(*ids), PATIENCE_SECONDS, "neighbours run")
        with Recovery("a hanging engine, until its jobs are queued", within_seconds=30):
            with Recovery("a hanging engine, until it is not ready", within_seconds=10):
                culprit = _submit(steady, "!hang")
                wait_until(lambda: not worker.shows_ready, PATIENCE_SECONDS, "it is not ready")
            wait_until(lambda: "released" in steady.tables.outcomes(neighbours[0].id), PATIENCE_SECONDS, "given back")
        steady.producer.cancel(culprit.id)  # it would hang again, alone
        witness.saw(culprit, *neighbours)
        witness.check()

    assert steady.producer.get(culprit.id).state is State.CANCELLED
    assert {(job.state, job.attempts) for job in map(steady.wait, ids)} == {(State.SUCCEEDED, 1)}


def test_a_job_that_kills_its_engine_each_time_fails_alone(steady: System, worker: WorkerProcesses) -> None:
    """It fails after three attempts and says why; those beside it finish and are charged for no attempt of theirs."""
    consumer = worker.consumer
    with Witness(steady) as witness:
        neighbours = [_submit(steady, PROMPT) for _ in range(3)]
        wait_until(lambda: worker.has_begun(*(job.id for job in neighbours)), PATIENCE_SECONDS, "neighbours run")
        with Recovery("a job that kills its engine", within_seconds=90):
            poison = _submit(steady, "!exit")
            later = steady.producer.submit_many([{"model": "faulty", "prompt": PROMPT}] * 3)
            ended = steady.wait(poison.id)
        witness.saw(poison, *neighbours, *later)
        witness.check()

    assert (ended.state, ended.attempts) == (State.FAILED, 3)
    assert ended.error is not None
    assert ended.error.code == "engine_lost"
    assert steady.tables.outcomes(poison.id)[-3:] == ["retried", "retried", "failed"]
    others = [steady.producer.get(job.id) for job in [*neighbours, *later]]
    assert {(job.state, job.text, job.attempts) for job in others} == {(State.SUCCEEDED, PROMPT, 1)}
    assert worker.consumer == consumer


# == helpers =====================================================================================================


def _submit(system: System, prompt: str, **fields: int) -> Job:
    return system.producer.submit(model="faulty", prompt=prompt, **fields)
