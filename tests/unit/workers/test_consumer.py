"""What the Celery application of a worker is made of; it is run in the acceptance tests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from celery.exceptions import Ignore
from celery.worker.control import Panel

from jobs.dispatch import DRAIN, PROVE, REVOKE, RUN_JOB, proof_queue_name, revoked_text
from jobs.errors import NotFound
from jobs.ids import new_id
from jobs.schema import JobRequest
from jobs.signing import MessageSigner
from jobs.states import AttemptOutcome
from kit.waiting import wait_until
from workers.consumer import fetch_while, worker_app
from workers.tasks import JobFailed
from workers.transport import Connection

PATIENCE_SECONDS = 10.0


@pytest.fixture
def revoked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What reached Celery's own revoke."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setitem(Panel.data, "revoke", lambda _, task_id, **options: calls.append((task_id, options)))
    return calls


@pytest.fixture
def app(host: Any, revoked: object) -> Celery:
    """The application of that host."""
    return worker_app(host.settings, host.real())


@pytest.fixture
def signed(host: Any) -> Callable[..., str]:
    """The signature of one of us."""
    return MessageSigner(host.settings.secret).sign


def test_each_lane_has_a_queue_and_so_have_the_worker_s_own_proofs(app: Celery, host: Any) -> None:
    """Proofs come first, so that no backlog delays them, then interactive jobs; none leaves a binding in Redis."""
    queues = app.conf.task_queues
    assert [queue.name for queue in queues] == [
        proof_queue_name("echo", host.worker_id),
        "echo.interactive",
        "echo.bulk",
    ]
    assert {(queue.exchange.name, queue.no_ack) for queue in queues} == {("", True)}


def test_a_task_that_arrives_proves_that_messages_do(app: Celery, host: Any) -> None:
    """The message that a worker sends to itself does nothing and shows up in no monitor."""
    assert app.tasks[PROVE]() is None
    assert app.tasks[PROVE].send_events is False


def test_it_dials_our_way(app: Celery) -> None:
    """Its connections wait for a broker as ours do; their clones, too, which Celery makes of them."""
    with app.connection_for_read() as connection:
        assert type(connection.clone()) is Connection


def test_a_message_that_asks_for_nothing_leaves_no_trace(app: Celery, signed: Callable[..., str]) -> None:
    """A duplicate is ignored: neither a success nor a failure in the monitor."""
    job_id = str(new_id())
    with pytest.raises(Ignore):
        app.tasks[RUN_JOB](job_id, signed(RUN_JOB, job_id))


def test_a_failed_job_is_a_failed_task(app: Celery, host: Any, signed: Callable[..., str]) -> None:
    """The error goes through to Celery, which expects it and prints no traceback."""
    host.store.waiting = [JobRequest.parse({"model": "echo", "messages": [{"role": "system", "content": "x"}]})]
    job_id = str(new_id())
    with pytest.raises(JobFailed):
        app.tasks[RUN_JOB](job_id, signed(RUN_JOB, job_id))
    assert JobFailed in app.tasks[RUN_JOB].throws


def test_a_drain_says_how_many_rows_it_ran(app: Celery, host: Any, signed: Callable[..., str]) -> None:
    """The bulk task's result is a count; its argument is only for people who watch."""
    host.store.waiting = [JobRequest(model="echo", prompt="x")] * 3
    assert app.tasks[DRAIN]("echo", signed(DRAIN, "echo")) == "3 rows"


def test_bulk_rows_are_drained_without_a_message(app: Celery, host: Any) -> None:
    """Rows seen at a heartbeat are run, once, and not by a worker that stops."""
    host.store.waiting = [JobRequest(model="echo", prompt="x")] * 3
    host.draining.set()
    host.on_backlog()
    host.draining.clear()
    with host.drained_by:
        host.on_backlog()
    assert host.store.asked == []

    host.on_backlog()
    wait_until(lambda: len(host.committer.settled) == 3, PATIENCE_SECONDS, "every row has run")
    assert {settlement.outcome for settlement in host.committer.settled} == {AttemptOutcome.SUCCEEDED}
    wait_until(lambda: not host.drained_by.locked(), PATIENCE_SECONDS, "the drain is over")


def test_a_revoke_cancels_and_never_terminates(
    app: Celery, host: Any, revoked: list[tuple[Any, dict[str, Any]]], signed: Callable[..., str]
) -> None:
    """Every job named is cancelled; what is no job is passed over; Celery is not asked to end a thread."""
    cancelled: list[UUID] = []
    unknown, known = new_id(), new_id()

    def cancel(job_id: UUID) -> None:
        if job_id == unknown:
            raise NotFound("no such job")
        cancelled.append(job_id)

    host.cancel = cancel
    revoke = Panel.data["revoke"]
    ids = ["no-id", str(unknown), str(known)]
    revoke(None, ids, signature=signed(REVOKE, revoked_text(ids)), terminate=True, signal="SIGTERM")
    revoke(None, str(known), signature=signed(REVOKE, str(known)))

    assert cancelled == [known, known]
    assert revoked == [
        (ids, {"terminate": False, "signal": "SIGTERM"}),
        (str(known), {"terminate": False}),
    ]


def test_what_none_of_us_signed_is_refused_before_anything_is_done(
    app: Celery, host: Any, signed: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """Forged, altered, for another job, for another task, unsigned, no text at all: no claim, and a line in the log."""
    host.store.waiting = [JobRequest(model="echo", prompt="x")]
    job_id, other = str(new_id()), str(new_id())
    forgeries: list[tuple[str, tuple[Any, ...]]] = [
        (RUN_JOB, (job_id,)),
        (RUN_JOB, (job_id, "0" * 64)),
        (RUN_JOB, (job_id, signed(RUN_JOB, other))),
        (RUN_JOB, (job_id, signed(DRAIN, job_id))),
        (RUN_JOB, (job_id, MessageSigner("t" * 32).sign(RUN_JOB, job_id))),
        (RUN_JOB, (job_id, {"not": "text"})),
        (RUN_JOB, (None, signed(RUN_JOB, job_id))),
        (DRAIN, ("echo", signed(RUN_JOB, "echo"))),
        (DRAIN, ("other", signed(DRAIN, "echo"))),
    ]
    with caplog.at_level(logging.WARNING):
        for task, arguments in forgeries:
            with pytest.raises(Ignore):
                app.tasks[task](*arguments)
    assert host.store.asked == []
    assert f"{len(forgeries)} so far" in caplog.text


def test_an_unsigned_revoke_cancels_nothing(app: Celery, host: Any, revoked: list[Any]) -> None:
    """Whoever can write to the broker cannot end other people's jobs."""
    host.cancel = pytest.fail
    for signature in ({}, {"signature": "0" * 64}):
        assert Panel.data[REVOKE](None, str(new_id()), terminate=True, **signature) == {"error": "not signed"}
    assert revoked == []


def test_a_worker_serves_three_tasks_and_no_command_that_hinders_it(app: Celery) -> None:
    """Celery's own tasks are gone, and nobody on the broker shuts a worker down or takes its queues away."""
    assert set(app.tasks) == {RUN_JOB, DRAIN, PROVE}
    assert {"shutdown", "cancel_consumer", "add_consumer", "pool_shrink", "time_limit"}.isdisjoint(Panel.data)
    assert {"ping", "stats", "active", "registered", "enable_events"} <= set(Panel.data)


def test_messages_are_left_to_others_while_a_worker_can_do_nothing_with_them() -> None:
    """It fetches when it can use what it gets, and a thread is free."""
    able = free = True
    qos = SimpleNamespace(can_consume=lambda: free)
    fetch_while(lambda: able, qos)
    assert qos.can_consume()
    able = False
    assert not qos.can_consume()
    able, free = True, False
    assert not qos.can_consume()


def test_celerys_end_drains_the_host(app: Celery, host: Any) -> None:
    """Before Celery waits for its threads, which wait for jobs, the host is told to let them end."""
    drained = threading.Event()
    host.start_draining = drained.set
    [step] = app.steps["worker"]
    step(None).close(None)
    assert drained.is_set()
