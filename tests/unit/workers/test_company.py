"""Who is computed beside whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from jobs.ids import new_id
from jobs.store import Claim
from kit.waiting import wait_until
from workers.company import Company
from workers.host import Held
from workers.tasks import run_job

PATIENCE_SECONDS = 10.0


class Others:
    """Requests in the engine, and a company that counts them."""

    def __init__(self) -> None:
        self.open = 0
        self.company = Company(lambda: self.open)
        self.events: list[str] = []

    def suspect(self, *, hurried: bool = False, over: threading.Event | None = None) -> threading.Thread:
        def run() -> None:
            with self.company.alone(lambda: hurried):
                self.events.append("suspect")
                assert over is None or over.wait(PATIENCE_SECONDS)

        return _started(run)

    def newcomer(self) -> threading.Thread:
        def run() -> None:
            with self.company.together():
                self.events.append("newcomer")

        return _started(run)


@pytest.fixture
def others() -> Others:
    """Nobody yet."""
    return Others()


def test_a_suspect_waits_until_all_others_have_left(others: Others) -> None:
    """It begins when the engine is empty."""
    others.open = 1
    suspect = others.suspect()
    others.newcomer().join(0.1)
    assert others.events == []
    others.open = 0
    suspect.join(PATIENCE_SECONDS)
    assert others.events[0] == "suspect"


def test_nobody_comes_in_while_a_suspect_runs(others: Others) -> None:
    """Who comes later waits for its end."""
    over = threading.Event()
    suspect = others.suspect(over=over)
    wait_until(lambda: others.events == ["suspect"], PATIENCE_SECONDS, "it runs")
    newcomer = others.newcomer()
    newcomer.join(0.1)
    assert others.events == ["suspect"]
    over.set()
    for thread in (suspect, newcomer):
        thread.join(PATIENCE_SECONDS)
    assert others.events == ["suspect", "newcomer"]


def test_a_suspect_that_is_to_stop_waits_for_nobody(others: Others) -> None:
    """A drain or a cancel must not wait for what others compute."""
    others.open = 1
    others.suspect(hurried=True).join(PATIENCE_SECONDS)
    assert others.events == ["suspect"]


def test_a_suspect_is_run_and_the_next_job_comes_after_it(
    host: Any, held: Callable[..., Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task of a suspect holds the door for as long as the engine works on it."""
    host.engine.at_once = None

    def claim(_: UUID, __: UUID, token: UUID) -> Claim:
        return held(token=token, suspect=not host.engine.requests).claim

    monkeypatch.setattr(host.store, "claim", claim)
    first = _started(lambda: run_job(host.real(), new_id()))
    wait_until(lambda: len(host.engine.submitted) == 1, PATIENCE_SECONDS, "the suspect runs")
    second = _started(lambda: run_job(host.real(), new_id()))
    second.join(0.1)
    assert len(host.engine.requests) == 1
    host.engine.end(host.engine.requests[0].id, "succeeded")
    wait_until(lambda: len(host.engine.requests) == 2, PATIENCE_SECONDS, "the next one runs")
    host.engine.end(host.engine.requests[1].id, "succeeded")
    for thread in (first, second):
        thread.join(PATIENCE_SECONDS)
    assert host.engine.most_open == 1


def _started(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread
