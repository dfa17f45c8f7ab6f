"""Workers behind proxies, and scenarios that mostly wait, run side by side: each on a system of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from jobs.schema import Job
from jobs.settings import Settings
from jobs.states import State
from kit.proxy import Proxy
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until
from kit.workers import WorkerProcesses

# What a worker has by default: recovery is measured with these.
DEFAULTS = {
    name: Settings.model_fields[name].default for name in ("lease_seconds", "heartbeat_seconds", "sweep_seconds")
}
PROMPT = "0123456789" * 3  # six tenths of a second of the slow engine


@dataclass(frozen=True)
class Behind:
    """A system whose one worker reaches both servers through proxies; its producer reaches them directly."""

    system: System
    worker: WorkerProcesses
    broker: Proxy
    database: Proxy

    def submit(self, count: int = 1, prompt: str = PROMPT) -> list[Job]:
        """Interactive jobs."""
        return [self.system.producer.submit(model="slow", prompt=prompt) for _ in range(count)]

    def begun(self, count: int = 1, prompt: str = PROMPT) -> list[Job]:
        """The same, and its worker's engine works on each."""
        jobs = self.submit(count, prompt)
        wait_until(lambda: self.worker.has_begun(*(job.id for job in jobs)), PATIENCE_SECONDS, "they run")
        return jobs

    def await_success(self, jobs: Sequence[Job]) -> None:
        """All of them."""
        assert {self.system.wait(job.id).state for job in jobs} == {State.SUCCEEDED}

    def await_shows_ready(self) -> None:
        """A probe finds it ready."""
        wait_until(lambda: self.worker.shows_ready, PATIENCE_SECONDS, "the worker is ready")

    def await_shows_unready(self) -> None:
        """A probe does not."""
        wait_until(lambda: not self.worker.shows_ready, PATIENCE_SECONDS, "the worker is not ready")


@dataclass(frozen=True)
class Standby:
    """A worker that is up and takes nothing, for it has no way to either server, until it is called."""

    worker: WorkerProcesses
    call: Callable[[], None]


@contextmanager
def standby(system: System, model: str = "slow") -> Iterator[Standby]:
    """One to take over at once: how long a worker takes to start is the machine's affair, not a fault's."""
    settings = system.settings
    with Proxy.before(str(settings.database_url)) as database, Proxy.before(str(settings.broker_url)) as broker:
        urls = {
            "database_url": database.url(str(settings.database_url)),
            "broker_url": broker.url(str(settings.broker_url)),
        }
        worker, ways = system.start(model, **urls), (broker, database)
        for way in ways:  # that to Redis first: no message is to be taken and held
            way.refuse()
            way.cut()
        wait_until(lambda: _has_no_lease(worker), PATIENCE_SECONDS, "its lease is over")

        def call() -> None:
            for way in ways:
                way.accept()

        try:
            yield Standby(worker, call)
        finally:
            worker.close()


def _has_no_lease(worker: WorkerProcesses) -> bool:
    lease = worker.lease()
    return lease is None or lease.seconds_left <= 0


Scenario: TypeAlias = Callable[[Behind], None]


@contextmanager
def side_by_side(
    scenarios: Sequence[Scenario], new_system: Callable[..., System], **changes: float
) -> Iterator[dict[str, Future[None]]]:
    """Start all of them at once, each with a worker that consumes; how each came out, by its name.

    `changes`: settings that are not the defaults.
    """
    with ExitStack() as stack:
        places = [stack.enter_context(_behind(new_system(**DEFAULTS, **changes))) for _ in scenarios]
        for place in places:
            place.await_success(place.submit())
        with ThreadPoolExecutor(len(scenarios)) as threads:
            started = zip(scenarios, places, strict=True)
            yield {scenario.__name__: threads.submit(scenario, place) for scenario, place in started}


@contextmanager
def _behind(system: System) -> Iterator[Behind]:
    broker_url, database_url = str(system.settings.broker_url), str(system.settings.database_url)
    with Proxy.before(broker_url) as broker, Proxy.before(database_url) as database:
        worker = system.launch("slow", broker_url=broker.url(broker_url), database_url=database.url(database_url))
        try:
            yield Behind(system, worker, broker, database)
        finally:
            worker.close()
