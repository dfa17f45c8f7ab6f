"""Ends that a client asks for: cancels and deadlines of jobs in every state, and races of a cancel against the end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from jobs.schema import Job
from jobs.states import State
from kit.invariants import Witness
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, THREADS, System
from kit.threads import all_at_once
from kit.waiting import wait_until

ENDLESS = {"prompt": "again ", "max_tokens": 30_000, "ignore_eos": True}
PAIRS = 1000
CLIENTS = 8


@pytest.fixture(scope="module")
def steady(new_system: Callable[..., System]) -> System:
    """A system with a slow worker and one that does many jobs at once."""
    system = new_system(lease_seconds=10.0)
    system.launch("slow")
    system.launch("wide")
    for worker in system.workers:
        worker.await_ready()
    return system


def test_a_generation_without_end_stops_within_a_step_of_its_cancel(steady: System) -> None:
    """What was made is kept and charged; nothing that was made after the cancel was heard."""
    with Witness(steady) as witness:
        job = _running(steady)
        witness.saw(job)
        with Recovery("an endless generation that is cancelled", within_seconds=1):
            steady.producer.cancel(job.id)
            ended = steady.wait(job.id)
        witness.check()
    assert ended.state is State.CANCELLED
    assert ended.usage is not None
    assert 1 <= ended.usage.completion_tokens < 1000
    assert ended.cost is not None
    assert ended.cost.token_dollars > 0


def test_a_generation_without_end_stops_at_its_deadline(steady: System) -> None:
    """One that runs ends as expired with what it made; one that still waits ends too, with nothing."""
    with Witness(steady) as witness:
        running = [steady.producer.submit(model="slow", deadline_seconds=1.5, **ENDLESS) for _ in range(THREADS)]
        waiting = steady.producer.submit(model="slow", prompt="x", deadline_seconds=1.0)
        with Recovery("endless generations with a deadline", within_seconds=10):
            ended = [steady.wait(job.id) for job in [*running, waiting]]
        witness.saw(*running, waiting)
        witness.check()
    assert {job.state for job in ended} == {State.EXPIRED}
    assert ended[0].usage is not None
    assert ended[0].usage.completion_tokens > 0


def test_a_cancel_ends_a_queued_and_a_blocked_job_at_once(steady: System) -> None:
    """Neither ever runs nor costs anything; the turn after a cancelled one goes on."""
    with Witness(steady) as witness:
        busy = [steady.producer.submit(model="slow", **ENDLESS) for _ in range(THREADS)]
        steady.await_state((job.id for job in busy), State.RUNNING)
        turns = [_turn(steady, text) for text in ("one", "two", "three")]
        queued = steady.producer.submit(model="slow", prompt="x")
        assert [steady.producer.get(job.id).state for job in turns] == [State.QUEUED, State.BLOCKED, State.BLOCKED]
        for job in (turns[1], queued, turns[0]):
            assert steady.producer.cancel(job.id).state is State.CANCELLED
        for job in busy:
            steady.producer.cancel(job.id)
        assert steady.wait(turns[2].id).state is State.SUCCEEDED
        witness.saw(*busy, *turns, queued)
        witness.check()
    assert steady.producer.get(queued.id).attempts == 0


def test_a_cancel_against_an_end_has_one_winner(steady: System) -> None:
    """A thousand jobs, each cancelled at about the time it ends: one end, one bill; what a client was told stays."""

    def race() -> list[State]:
        """One job after the other. The loser starts earlier next time, so that either wins on any machine."""
        delay_seconds, ends = 0.02, list[State]()
        for _ in range(PAIRS // CLIENTS):
            job = steady.producer.submit(model="wide", prompt="x")
            witness.saw(job)
            threading.Event().wait(delay_seconds)
            told = steady.producer.cancel(job.id).state
            ended = steady.wait(job.id).state
            assert told in {ended, State.RUNNING}
            delay_seconds *= 0.8 if ended is State.SUCCEEDED else 1.25
            ends.append(ended)
        return ends

    with Witness(steady) as witness:
        ends = [end for client in all_at_once([race] * CLIENTS) for end in client]
        witness.check()
    assert len(ends) == PAIRS
    assert set(ends) == {State.SUCCEEDED, State.CANCELLED}


def test_many_cancels_of_one_job_are_one_end(steady: System) -> None:
    """Eight clients at once; the ledger has one row."""
    job = _running(steady)
    all_at_once([lambda: steady.producer.cancel(job.id)] * CLIENTS)
    assert steady.wait(job.id).state is State.CANCELLED
    assert steady.tables.ledger(job.id)["state"] == "cancelled"


# == helpers =====================================================================================================


def _running(system: System) -> Job:
    job = system.producer.submit(model="slow", **ENDLESS)
    wait_until(lambda: system.workers[0].has_begun(job.id), PATIENCE_SECONDS, "it runs")
    return job


def _turn(system: System, text: str) -> Job:
    messages = [{"role": "user", "content": text}]
    return system.producer.submit(model="slow", messages=messages, conversation="a talk")
