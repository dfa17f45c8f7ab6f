"""I8: a worker is not ready within ten seconds of a cause, and ready within ten seconds of its cure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from jobs.settings import Settings
from kit.proxy import Proxy
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until
from kit.workers import WorkerProcesses

DEFAULTS = {name: Settings.model_fields[name].default for name in ("lease_seconds", "heartbeat_seconds")}


@pytest.fixture(scope="module")
def behind(new_system: Callable[..., System]) -> Iterator[tuple[WorkerProcesses, Proxy, Proxy]]:
    """A worker that reaches Redis and Postgres through proxies."""
    system = new_system(**DEFAULTS)
    broker_url, database_url = str(system.settings.broker_url), str(system.settings.database_url)
    with Proxy.before(broker_url) as broker, Proxy.before(database_url) as database:
        worker = system.start("slow", broker_url=broker.url(broker_url), database_url=database.url(database_url))
        yield worker, broker, database
        worker.close()


@pytest.mark.parametrize("server", ["Redis", "Postgres"])
def test_readiness_follows_the_servers(behind: tuple[WorkerProcesses, Proxy, Proxy], server: str) -> None:
    """Without Postgres it cannot claim, without Redis no message arrives; with both it is ready again."""
    worker, broker, database = behind
    proxy = broker if server == "Redis" else database
    _await_ready(worker)
    with Recovery(f"{server} away, until not ready", within_seconds=10):
        proxy.refuse()
        proxy.cut()
        wait_until(lambda: not worker.shows_ready, PATIENCE_SECONDS, "it is not ready")
    with Recovery(f"{server} back, until ready", within_seconds=10):
        proxy.accept()
        _await_ready(worker)


@pytest.mark.parametrize("process", ["engine", "consumer"])
def test_readiness_follows_the_processes(behind: tuple[WorkerProcesses, Proxy, Proxy], process: str) -> None:
    """One that is killed makes the worker unready at once, and ready again when its successor works."""
    worker = behind[0]
    _await_ready(worker)
    with Recovery(f"the {process} killed, until not ready", within_seconds=10):
        getattr(worker, process).kill()
        wait_until(lambda: not worker.shows_ready, PATIENCE_SECONDS, "it is not ready")
    with Recovery(f"the {process} killed, until ready", within_seconds=10):
        _await_ready(worker)


def test_a_frozen_consumer_is_neither_ready_nor_alive(behind: tuple[WorkerProcesses, Proxy, Proxy]) -> None:
    """It cannot say so itself: the supervisor does, and the file of its life gets no younger."""
    worker = behind[0]
    _await_ready(worker)
    consumer, before = worker.consumer, (worker.health / "consumer").stat().st_mtime
    with Recovery("a frozen consumer, until not ready", within_seconds=15):
        consumer.suspend()
        wait_until(lambda: not worker.shows_ready, PATIENCE_SECONDS, "it is not ready")
    assert (worker.health / "consumer").stat().st_mtime - before < DEFAULTS["heartbeat_seconds"] * 2
    assert (worker.health / "supervisor").stat().st_mtime > (worker.health / "consumer").stat().st_mtime
    consumer.resume()
    with Recovery("a frozen consumer that thaws, until ready", within_seconds=10):
        _await_ready(worker)


def test_a_worker_that_drains_is_not_ready_and_leaves_nothing_behind(
    behind: tuple[WorkerProcesses, Proxy, Proxy],
) -> None:
    """The last test here: it stops the worker."""
    worker = behind[0]
    _await_ready(worker)
    worker.begin_stop()
    assert worker.wait() == 0
    assert list(worker.health.iterdir()) == []


def _await_ready(worker: WorkerProcesses) -> None:
    wait_until(lambda: worker.shows_ready, PATIENCE_SECONDS, "the worker is ready")
