"""The soak counts each promise that is broken while faults come; the others are `test_invariants.py`'s."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from jobs.errors import IdempotencyConflict
from jobs.states import State
from kit import soak as module
from kit.bulk import BulkClient
from kit.invariants import check_memory
from kit.soak import Soak

REQUEST = {"model": "slow", "prompt": "x", "idempotency_key": "one"}
_NO_PROCESS = 2**22 + 1  # above the highest pid of Linux


class Producer:
    """Takes requests, by idempotency key where they have one, and ends each at once."""

    def __init__(self) -> None:
        self.forgets_keys = self.ignores_requests = False
        self.state = State.SUCCEEDED
        self._taken: dict[str, tuple[dict[str, Any], UUID]] = {}

    def submit(self, *, job_id: UUID | None = None, **request: Any) -> Any:
        key = request.get("idempotency_key", str(job_id))
        if self.forgets_keys or key not in self._taken:
            self._taken[key] = (request, job_id or uuid4())
        before, accepted = self._taken[key]
        if before != request and not self.ignores_requests:
            raise IdempotencyConflict(key)
        return SimpleNamespace(id=accepted)

    def get(self, job_id: UUID) -> Any:
        return SimpleNamespace(id=job_id, state=self.state)


class Anything:
    """A server, a proxy before one, a process: whatever is done to it."""

    def __getattr__(self, name: str) -> Callable[[], int]:
        return lambda: 1


@pytest.fixture
def producer() -> Producer:
    return Producer()


@pytest.fixture
def holders() -> list[dict[str, Any]]:
    """Who holds the jobs that run."""
    return [{"pid": os.getpid(), "lease_is_over": False}]


@pytest.fixture
def soak(producer: Producer, holders: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Soak:
    """One without a system, which waits for nothing."""
    for bound in ("SOON_SECONDS", "TURN_SECONDS"):
        monkeypatch.setattr(module, bound, 0.0)
    anything: Any = Anything()
    system: Any = SimpleNamespace(producer=producer, tables=SimpleNamespace(rows=lambda _: holders))
    return Soak(system, anything, anything, anything, random.Random(1))


def test_a_key_that_is_another_job_the_second_time_is_a_violation(soak: Soak, producer: Producer) -> None:
    """I6, the first half."""
    job_id = producer.submit(**REQUEST).id
    module._submit_again(soak, REQUEST, job_id)
    assert soak.violations == []
    producer.forgets_keys = True
    module._submit_again(soak, REQUEST, job_id)
    assert "I6" in soak.violations[0]


def test_a_key_that_takes_another_request_is_a_violation(soak: Soak, producer: Producer) -> None:
    """I6, the second half."""
    job_id = producer.submit(**REQUEST).id
    producer.ignores_requests = True
    module._submit_again(soak, REQUEST, job_id)
    assert ["I6" in line for line in soak.violations] == [True]


@pytest.mark.parametrize("harm", [{"pid": _NO_PROCESS}, {"lease_is_over": True}, None], ids=str)
def test_what_does_not_recover_is_a_violation(
    soak: Soak, producer: Producer, holders: list[dict[str, Any]], harm: dict[str, Any] | None
) -> None:
    """I7: a dead process or a lease that is over holds a job, or a new job does not end."""
    soak.recover()
    assert soak.violations == []
    if harm is None:
        producer.state = State.QUEUED
    else:
        holders.append(holders[0] | harm)
    soak.recover()
    assert ["I7" in line for line in soak.violations] == [True]


def test_a_worker_that_stays_ready_without_a_server_is_a_violation(soak: Soak) -> None:
    """I8, before the cure."""
    soak.workers[0] = SimpleNamespace(shows_ready=True)  # type: ignore[assignment]
    module.redis_away(soak)
    assert soak.violations == ["I8 unready without Redis: not within 0 s"]


def test_a_worker_that_does_not_become_ready_again_is_a_violation(soak: Soak) -> None:
    """I8, after it."""
    shown = iter([True, False, False])
    soak.workers[0] = type("Worker", (), {"shows_ready": property(lambda _: next(shown, False))})()
    module.postgres_away(soak)
    assert soak.violations == ["I8 ready with Postgres: not within 0 s"]


@pytest.mark.parametrize("content", ['{"custom_id": "line 1"}\n', '{"custom_id": "li'], ids=["lacks-lines", "torn"])
def test_a_file_that_is_not_whole_is_a_violation(
    soak: Soak, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """I4: it is looked at as soon as the client that wrote it has been killed."""
    monkeypatch.setattr("kit.bulk.start_run", lambda *_: Anything())
    client = BulkClient(soak.system, tmp_path, "slow", 2)
    monkeypatch.setattr(soak, "bulk", client, raising=False)
    client._output.write_text(content)
    module.bulk_client_killed(soak)
    assert ["I4" in line for line in soak.violations] == [True]


@pytest.mark.parametrize(("after_third", "broken"), [(110, False), (111, True)])
def test_a_leak_is_a_violation(soak: Soak, after_third: int, broken: bool) -> None:  # noqa: FBT001
    """I9: against the second load, not the first."""
    held = iter([10, 100, after_third])

    def members() -> Any:
        return [SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(held)))]

    with soak.noting():
        check_memory(members, lambda: None)
    assert ["I9" in line for line in soak.violations] == [True] * broken
