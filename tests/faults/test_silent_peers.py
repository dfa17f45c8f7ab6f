"""Peers that keep their connections and answer nothing, and what is lost on the way.

Scenarios mostly wait, so all of them run at once, each with a worker of its own behind proxies of its own, and with the
settings that a worker has by default. Each measures from its fault on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from functools import partial

import pytest
from sqlalchemy import Connection, text

from jobs.database import Database
from jobs.errors import StoreUnavailable
from jobs.schema import Job
from jobs.states import Lane, State
from kit.invariants import Witness
from kit.proxied import PROMPT, Behind, Scenario, side_by_side, standby
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until
from producer.client import Producer


def a_worker_whose_redis_connections_fell_silent_consumes_again(behind: Behind) -> None:
    """What was popped into the void is sent again; what runs meanwhile runs on, under the same lease."""
    identity, consumer = behind.worker.await_ready().id, behind.worker.consumer
    with Witness(behind.system) as witness:
        running = behind.system.producer.submit_many([{"model": "slow", "prompt": PROMPT * 10}])
        wait_until(lambda: behind.worker.has_begun(running[0].id), PATIENCE_SECONDS, "it runs")
        with Recovery("a silent Redis", within_seconds=20):
            behind.broker.silence(new_too=False)
            jobs = behind.submit(3)
            behind.await_success(jobs)
        witness.saw(*running, *jobs)
        witness.check()

    assert behind.system.tables.outcomes(running[0].id) == ["succeeded"]
    assert (behind.worker.await_ready().id, behind.worker.consumer) == (identity, consumer)


def a_popped_message_that_is_lost_on_the_wire_is_sent_again(behind: Behind) -> None:
    """Redis has handed it out, nobody got it: the row is queued, and its queue is empty."""
    with Recovery("a message lost on the wire", within_seconds=30):
        behind.broker.swallow(b"headrace.run_job", "down")
        [job] = behind.submit()
        wait_until(lambda: _is_popped(behind.system), PATIENCE_SECONDS, "the message was popped")
        behind.broker.heal()
        behind.await_success([job])
    assert behind.system.tables.outcomes(job.id) == ["succeeded"]


def a_consumer_that_gets_no_messages_is_started_again_beside_the_same_engine(behind: Behind) -> None:
    """Lease and engine are well, connections too, dialling again does not help: only the proof tells."""
    consumer, engine = behind.worker.consumer, behind.worker.engine
    with Recovery("a consumer that gets no messages", within_seconds=30):
        behind.broker.swallow(b"BRPOP", "up")
        jobs = behind.submit(2)
        wait_until(lambda: behind.worker.consumer != consumer, PATIENCE_SECONDS, "the consumer is started again")
        behind.broker.heal()
        behind.await_success(jobs)
    assert behind.worker.engine == engine


def jobs_of_a_worker_whose_postgres_fell_silent_run_elsewhere(behind: Behind) -> None:
    """Its lease ends, others take its rows over; when Postgres answers again it comes back as a new worker."""
    identity = behind.worker.await_ready().id
    with Witness(behind.system) as witness:
        with standby(behind.system) as other:
            jobs = behind.begun(3, PROMPT * 8)
            begun = partial(other.worker.has_begun, *(job.id for job in jobs))
            with Recovery("a silent Postgres", within_seconds=20):
                behind.database.silence()
                assert {behind.system.producer.get(job.id).state for job in jobs} == {State.RUNNING}
                other.call()
                wait_until(begun, PATIENCE_SECONDS, "they run elsewhere")
            witness.saw(*jobs)
            behind.await_success(jobs)

        with Recovery("after a silent Postgres", within_seconds=20):
            behind.database.heal()
            behind.await_success(behind.submit())
        witness.check()
    assert behind.worker.await_ready().id != identity


def a_worker_whose_postgres_connections_fell_silent_dials_again_before_its_lease_ends(behind: Behind) -> None:
    """As when a device in between forgets them: no attempt is lost, the lease stays."""
    identity = behind.worker.await_ready().id
    with Witness(behind.system) as witness:
        jobs = behind.begun(3)
        with Recovery("silent connections to Postgres", within_seconds=20):
            behind.database.silence(new_too=False)
            behind.await_success(jobs)
        witness.saw(*jobs)
        witness.check()
    assert {tuple(behind.system.tables.outcomes(job.id)) for job in jobs} == {("succeeded",)}
    assert behind.worker.await_ready().id == identity


def a_client_that_vanished_in_a_transaction_holds_a_row_for_seconds_only(behind: Behind) -> None:
    """Postgres ends a session that idles in a transaction; whoever waits for its row goes on."""
    job = behind.system.producer.submit(model="other", prompt="x")  # no worker has that model: it stays queued
    with Recovery("a half-open client", within_seconds=20), _locked(behind, job):
        behind.database.silence(new_too=False)
        wait_until(lambda: _cancels(behind.system, job), PATIENCE_SECONDS, "the row can be changed")
    behind.database.heal()
    assert behind.system.wait(job.id).state is State.CANCELLED
    behind.await_success(behind.submit())


def a_reply_lost_after_the_commit_doubles_nothing(behind: Behind) -> None:
    """Claims, ends and submits whose replies are lost are read back by token and id: 500 jobs, each once."""
    settings = behind.system.settings
    url = behind.database.url(str(settings.database_url))
    with Witness(behind.system) as witness, Producer(settings.model_copy(update={"database_url": url})) as producer:
        behind.database.lose(0.05, "down")
        jobs = [producer.submit(model="slow", prompt="x", idempotency_key=f"lost-{i}") for i in range(250)]
        jobs += producer.submit_many({"model": "slow", "prompt": "x"} for _ in range(250))
        witness.saw(*jobs)
        wait_until(lambda: len(witness.first_read) >= 400, PATIENCE_SECONDS, "most have ended")
        behind.system.check_connections(1)
        behind.database.heal()
        witness.check()
        same = [producer.submit(model="slow", prompt="x", idempotency_key=f"lost-{i}").id for i in range(250)]

    assert same == [job.id for job in jobs[:250]]
    assert {job.state for job in behind.system.producer.list(limit=500)} == {State.SUCCEEDED}


# == helpers =====================================================================================================


def _is_popped(system: System) -> bool:
    return system.producer.dispatcher.depth("slow", Lane.INTERACTIVE, PATIENCE_SECONDS) == 0


@contextmanager
def _locked(behind: Behind, job: Job) -> Iterator[None]:
    """A client behind the proxy has locked the job's row, and will say no more word."""
    locked, silent = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": job.id})
        locked.set()
        silent.wait()

    def lock() -> None:
        url = behind.database.url(str(behind.system.settings.database_url))
        with closing(Database(url, wait_seconds=0.0, answer_seconds=1.0)) as database, suppress(StoreUnavailable):
            database.run(hold)

    thread = threading.Thread(target=lock)
    thread.start()
    try:
        assert locked.wait(PATIENCE_SECONDS)
        yield
    finally:
        silent.set()
        thread.join()


def _cancels(system: System, job: Job) -> bool:
    with suppress(StoreUnavailable):
        return system.producer.cancel(job.id).state is State.CANCELLED
    return False


# == all at once ==================================================================================================

SCENARIOS: list[Scenario] = [
    a_worker_whose_redis_connections_fell_silent_consumes_again,
    a_popped_message_that_is_lost_on_the_wire_is_sent_again,
    a_consumer_that_gets_no_messages_is_started_again_beside_the_same_engine,
    jobs_of_a_worker_whose_postgres_fell_silent_run_elsewhere,
    a_worker_whose_postgres_connections_fell_silent_dials_again_before_its_lease_ends,
    a_client_that_vanished_in_a_transaction_holds_a_row_for_seconds_only,
    a_reply_lost_after_the_commit_doubles_nothing,
]


@pytest.fixture(scope="module")
def outcomes(new_system: Callable[..., System]) -> Iterator[dict[str, Future[None]]]:
    """How each scenario came out."""
    with side_by_side(SCENARIOS, new_system) as outcomes:
        yield outcomes


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_recovery(outcomes: dict[str, Future[None]], scenario: str) -> None:
    """What the scenario's own sentence says."""
    outcomes[scenario].result()
