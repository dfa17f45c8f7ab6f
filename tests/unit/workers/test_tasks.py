"""The path of a job through a worker, with an engine and a store in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from jobs.ids import new_id
from jobs.schema import JobRequest
from jobs.states import AttemptOutcome
from kit.waiting import wait_until
from models.protocol import GenerationRequest
from workers import tasks

PATIENCE_SECONDS = 10.0


def requests(count: int) -> list[JobRequest]:
    """As many small requests."""
    return [JobRequest(model="echo", prompt=f"prompt {number}", max_tokens=5) for number in range(count)]


# == one job =====================================================================================================


def test_a_job_goes_from_claim_to_settlement(host: Any) -> None:
    """The claim becomes the engine's request, the engine's end the settlement; nothing stays in the hands."""
    host.store.waiting = requests(1)
    assert tasks.run_job(host.real(), new_id()) == "succeeded"

    [request], [settlement] = host.engine.requests, host.committer.settled
    assert isinstance(request, GenerationRequest)
    assert request.id == f"{settlement.id}/{settlement.token}"
    assert request.prompt_token_ids == tuple(b"prompt 0")
    assert request.sampling.max_tokens == 5
    assert settlement.outcome is AttemptOutcome.SUCCEEDED
    assert host.hands.tokens() == []


def test_a_message_for_a_job_that_is_gone_is_not_ours(host: Any) -> None:
    """A duplicate or late message claims nothing and leaves nothing in the hands."""
    with pytest.raises(tasks.NotOurs):
        tasks.run_job(host.real(), new_id())
    assert host.engine.requests == []
    assert host.hands.tokens() == []


def test_a_message_that_is_faster_than_its_row_waits_for_it(host: Any) -> None:
    """It was sent while the row was being committed: the row is looked for, and then claimed."""
    host.store.committing = requests(1)
    assert tasks.run_job(host.real(), new_id()) == "succeeded"
    assert host.store.looks == 3


def test_a_message_whose_row_never_comes_is_not_ours(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commit failed: after a while nobody looks any more."""
    monkeypatch.setattr(host.store, "exists", lambda _: False)
    with pytest.raises(tasks.NotOurs):
        tasks.run_job(host.real(), new_id())
    assert host.store.asked == [1]
    assert host.hands.tokens() == []


def test_a_failed_job_raises_after_its_commit(host: Any) -> None:
    """The monitor sees a failed task, whose message is the job's error; the settlement came first."""
    host.store.waiting = [JobRequest.parse({"model": "echo", "messages": [{"role": "system", "content": "x"}]})]
    with pytest.raises(tasks.JobFailed, match="invalid_value: messages: "):
        tasks.run_job(host.real(), new_id())
    assert [settlement.outcome for settlement in host.committer.settled] == [AttemptOutcome.FAILED]


@pytest.mark.parametrize("counts", [False, True])
def test_a_job_that_was_taken_over_or_given_back_is_not_ours(host: Any, *, counts: bool) -> None:
    """Neither a late finish nor a released job ends the task as a success."""
    host.store.waiting = requests(1)
    host.engine.at_once = "released" if counts else "succeeded"
    host.committer.counts = counts
    with pytest.raises(tasks.NotOurs):
        tasks.run_job(host.real(), new_id())


def test_an_unexpected_error_in_preparing_costs_only_its_own_job(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong before the engine, the job ends or is tried again, and is not held for ever."""
    real = host.format.encode_text
    bad = JobRequest(model="echo", prompt="bad")

    def encode(text: str) -> list[int]:
        if text == "bad":
            raise ZeroDivisionError("a bug")
        return list(real(text))

    monkeypatch.setattr(host.format, "encode_text", encode)
    host.store.waiting = [*requests(2), bad, *requests(1)]
    assert tasks.drain(host.real()) == 4
    outcomes = sorted(settlement.outcome for settlement in host.committer.settled)
    assert outcomes == [AttemptOutcome.RETRIED, *[AttemptOutcome.SUCCEEDED] * 3]
    assert host.hands.tokens() == []


def test_a_history_that_cannot_be_read_is_tried_again(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of Postgres between claim and engine is a retry, not a failure."""
    real = host.store._take
    monkeypatch.setattr(host.store, "_take", lambda *arguments: [_as_turn(claim) for claim in real(*arguments)])
    host.store.waiting = [JobRequest.parse({"model": "echo", "messages": [{"role": "user", "content": "x"}]})]
    with pytest.raises(tasks.NotOurs):
        tasks.run_job(host.real(), new_id())
    [settlement] = host.committer.settled
    assert settlement.outcome is AttemptOutcome.RETRIED
    assert settlement.error is not None
    assert settlement.error.code == "store_unavailable"


def _as_turn(claim: Any) -> Any:
    return replace(claim, conversation="talk", turn=2)


def test_a_stop_between_claim_and_engine_is_passed_on(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job cancelled while its prompt is prepared is cancelled in the engine right after it got there."""
    host.store.waiting = requests(1)
    host.engine.at_once = None

    def encode(text: str) -> list[int]:
        for one in host.hands.mark(host.hands.all(), "cancel"):
            host.engine.cancel(one.request_id)  # the engine does not know it yet
        return list(text.encode())

    monkeypatch.setattr(host.format, "encode_text", encode)
    task = _started(lambda: tasks.run_job(host.real(), new_id()))
    _await(lambda: len(host.engine.cancelled) == 2)
    [request] = host.engine.requests
    assert host.engine.cancelled == [request.id, request.id]
    host.engine.end(request.id, "cancelled")
    task.join(PATIENCE_SECONDS)
    assert [settlement.outcome for settlement in host.committer.settled] == [AttemptOutcome.CANCELLED]


def test_a_fenced_job_is_dropped_without_a_word(host: Any) -> None:
    """A job that was stopped because the lease ends is somebody else's: nothing is written."""
    host.store.waiting = requests(1)
    host.engine.at_once = None
    failures: list[BaseException] = []
    task = _started(lambda: _catch(failures, lambda: tasks.run_job(host.real(), new_id())))
    _await(lambda: host.engine.requests)
    host.hands.mark(host.hands.all(), "fence")
    host.engine.end(host.engine.requests[0].id, "cancelled")
    task.join(PATIENCE_SECONDS)
    assert [type(failure) for failure in failures] == [tasks.NotOurs]
    assert (host.committer.settled, host.hands.tokens()) == ([], [])


def test_nothing_is_claimed_while_the_engine_starts(host: Any) -> None:
    """Without an engine the job stays in the queue, and a worker that stops lets the message go."""
    host.store.waiting = requests(1)
    host.engine.ready.clear()
    host.draining.set()
    with pytest.raises(tasks.NotOurs):
        tasks.run_job(host.real(), new_id())
    assert host.store.asked == []


# == bulk ========================================================================================================


def test_a_drain_runs_every_row_and_claims_only_what_there_is_room_for(host: Any) -> None:
    """All rows run; no claim asks for more than the slots, and the engine never holds more."""
    host.store.waiting = requests(50)
    assert tasks.drain(host.real()) == 50
    assert len(host.committer.settled) == 50
    assert max(host.store.asked) <= host.slots
    assert host.engine.most_open <= host.slots
    assert host.hands.tokens() == []


def test_a_full_engine_is_not_fed(host: Any) -> None:
    """With every slot taken nothing more is claimed; a freed slot is filled again."""
    host.store.waiting = requests(9)
    host.engine.at_once = None
    task = _started(lambda: tasks.drain(host.real()))
    for _ in range(9):
        _await(lambda: len(host.engine.submitted) == min(4, 9 - len(host.committer.settled)))
        assert len(host.engine.submitted) <= host.slots
        host.engine.end(next(iter(host.engine.submitted)), "succeeded")
    task.join(PATIENCE_SECONDS)
    assert not task.is_alive()
    assert len(host.committer.settled) == 9


def test_one_drain_at_a_time(host: Any) -> None:
    """A second message for the route asks for nothing while the first is at work."""
    with host.drained_by, pytest.raises(tasks.NotOurs):
        tasks.drain(host.real())
    assert tasks.drain(host.real()) == 0


def test_a_drain_outlives_an_outage_of_postgres_while_rows_run(host: Any) -> None:
    """Claims that fail are made again as long as rows run; the rows themselves are not disturbed."""
    host.store.waiting = requests(6)
    host.engine.at_once = None
    task = _started(lambda: tasks.drain(host.real()))
    _await(lambda: len(host.engine.submitted) == 4)
    host.store.outages = 1
    first, *others = host.engine.submitted
    host.engine.end(first, "succeeded")
    _await(lambda: host.store.outages == 0)
    for request_id in others:
        host.engine.end(request_id, "succeeded")
    _await(lambda: len(host.engine.submitted) == 2)
    for request_id in list(host.engine.submitted):
        host.engine.end(request_id, "succeeded")
    task.join(PATIENCE_SECONDS)
    assert not task.is_alive()
    assert len(host.committer.settled) == 6


def test_a_drain_ends_when_postgres_is_away_and_nothing_runs(host: Any) -> None:
    """It neither raises nor spins: the next heartbeat starts another."""
    host.store.waiting = requests(1)
    host.store.outages = 1
    assert tasks.drain(host.real()) == 0
    assert host.hands.tokens() == []
    assert tasks.drain(host.real()) == 1


def test_a_stopping_worker_claims_no_more_and_waits_for_what_runs(host: Any) -> None:
    """On a stop the drain finishes its rows and leaves the rest of the backlog."""
    host.store.waiting = requests(10)
    host.engine.at_once = None
    task = _started(lambda: tasks.drain(host.real()))
    _await(lambda: len(host.engine.submitted) == 4)
    host.draining.set()
    for request_id in list(host.engine.submitted):
        assert task.is_alive()
        host.engine.end(request_id, "succeeded")
    task.join(PATIENCE_SECONDS)
    assert not task.is_alive()
    assert (len(host.committer.settled), len(host.store.waiting)) == (4, 6)


# == helpers =====================================================================================================


def _started(work: Callable[[], object]) -> threading.Thread:
    """The work, in a thread that cannot keep the test run from ending."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _await(predicate: Callable[[], object]) -> None:
    wait_until(predicate, PATIENCE_SECONDS, "the other thread came so far")


def _catch(failures: list[BaseException], call: Any) -> None:
    try:
        call()
    except Exception as failure:  # noqa: BLE001
        failures.append(failure)
