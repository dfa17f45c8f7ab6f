"""I8: a worker is not ready within ten seconds of a cause, and ready within ten seconds of its cure.

The scenarios run at once, each with a worker of its own behind proxies of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from jobs.states import State
from kit.proxied import DEFAULTS, PROMPT, Behind, Scenario, side_by_side
from kit.proxy import Proxy
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, THREADS, System
from kit.waiting import wait_until


def readiness_follows_redis(behind: Behind) -> None:
    """Without it no message arrives."""
    _follows(behind, "Redis", behind.broker)


def readiness_follows_postgres(behind: Behind) -> None:
    """Without it nothing can be claimed."""
    _follows(behind, "Postgres", behind.database)


def readiness_follows_the_processes(behind: Behind) -> None:
    """One that is killed makes the worker unready at once, and ready again when its successor works."""
    for process in ("engine", "consumer"):
        behind.await_shows_ready()
        with Recovery(f"the {process} killed, until not ready", within_seconds=10):
            getattr(behind.worker, process).kill()
            behind.await_shows_unready()
        with Recovery(f"the {process} killed, until ready", within_seconds=10):
            behind.await_shows_ready()


def a_frozen_consumer_is_neither_ready_nor_alive(behind: Behind) -> None:
    """It cannot say so itself: the supervisor does, and the file of its life gets no younger."""
    behind.await_shows_ready()
    consumer, alive = behind.worker.consumer, behind.worker.health / "consumer"
    with Recovery("a frozen consumer, until not ready", within_seconds=10 + DEFAULTS["heartbeat_seconds"]):
        consumer.suspend()
        frozen_at = alive.stat().st_mtime
        behind.await_shows_unready()
    assert alive.stat().st_mtime == frozen_at
    assert (behind.worker.health / "supervisor").stat().st_mtime > frozen_at + DEFAULTS["heartbeat_seconds"]
    consumer.resume()
    with Recovery("a frozen consumer that thaws, until ready", within_seconds=10):
        behind.await_shows_ready()


def a_worker_that_drains_is_not_ready_and_leaves_nothing_behind(behind: Behind) -> None:
    """The folder is empty when it has ended."""
    behind.await_shows_ready()
    behind.worker.begin_stop()
    assert behind.worker.wait() == 0
    assert list(behind.worker.health.iterdir()) == []


def a_worker_with_every_thread_busy_stays_ready(behind: Behind, seconds: float = 12.0) -> None:
    """No message arrives, and rightly so: for longer than a consumer may be deaf it is left alone."""
    behind.await_shows_ready()
    consumer = behind.worker.consumer
    jobs = behind.submit(THREADS, PROMPT * 200)
    behind.system.await_state([job.id for job in jobs], State.RUNNING)
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until or not behind.worker.shows_ready, PATIENCE_SECONDS, "a long time")
    assert behind.worker.shows_ready
    for job in jobs:
        behind.system.producer.cancel(job.id)
    behind.await_success(behind.submit())
    assert behind.worker.consumer == consumer


# == helpers =====================================================================================================


def _follows(behind: Behind, server: str, proxy: Proxy) -> None:
    behind.await_shows_ready()
    with Recovery(f"{server} away, until not ready", within_seconds=10):
        proxy.refuse()
        proxy.cut()
        behind.await_shows_unready()
    with Recovery(f"{server} back, until ready", within_seconds=10):
        proxy.accept()
        behind.await_shows_ready()


# == all at once =================================================================================================

SCENARIOS: list[Scenario] = [
    readiness_follows_redis,
    readiness_follows_postgres,
    readiness_follows_the_processes,
    a_frozen_consumer_is_neither_ready_nor_alive,
    a_worker_that_drains_is_not_ready_and_leaves_nothing_behind,
    a_worker_with_every_thread_busy_stays_ready,
]


@pytest.fixture(scope="module")
def outcomes(new_system: Callable[..., System]) -> Iterator[dict[str, Future[None]]]:
    """How each scenario came out."""
    with side_by_side(SCENARIOS, new_system) as outcomes:
        yield outcomes


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_readiness(outcomes: dict[str, Future[None]], scenario: str) -> None:
    """What the scenario's own sentence says."""
    outcomes[scenario].result()


@pytest.mark.soak
def test_a_worker_with_every_thread_busy_for_a_minute_stays_ready(new_system: Callable[..., System]) -> None:
    """Nor is it started again."""

    def for_a_minute(behind: Behind) -> None:
        a_worker_with_every_thread_busy_stays_ready(behind, 60.0)

    with side_by_side([for_a_minute], new_system) as outcomes:
        outcomes["for_a_minute"].result()
