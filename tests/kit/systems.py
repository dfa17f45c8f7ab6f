"""A whole Headrace for a test: a database and a key prefix of its own, a producer, and workers as they are wanted."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self
from uuid import UUID

import psycopg
import redis

from jobs.schema import Job
from jobs.settings import Settings
from jobs.states import State
from kit.contract import Tables
from kit.databases import SECRET, temporary_database
from kit.waiting import wait_until
from kit.workers import WorkerProcesses
from producer.client import Producer

PATIENCE_SECONDS = 120.0
# Of a worker with four slots.
THREADS = 4 + 8
# Of each worker to Postgres, over all of its pools: 8 + 8 + 8 for jobs, and one of each kind for heartbeats and sweeps.
CONNECTIONS_OF_A_WORKER = 30
_OPEN = [state for state in State if not state.final]
# So that a death is noticed in seconds. A worker of a test that must not be taken for dead keeps the defaults.
SHORT_LEASES = {"lease_seconds": 3.0, "heartbeat_seconds": 0.5, "sweep_seconds": 0.5}


class Addresses(Protocol):
    """Where servers are."""

    @property
    def database_url(self) -> str: ...

    @property
    def broker_url(self) -> str: ...


class System:
    """Producer and workers that share one set of settings. A context manager: no worker survives it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.producer = Producer(settings)
        self.workers: list[WorkerProcesses] = []
        self._folder = folder
        self._open = ExitStack()
        self._tables: Tables | None = None

    def __enter__(self) -> Self:
        self._open.callback(self.producer.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def start(
        self, model: str = "echo", environment: Mapping[str, str] | None = None, **changes: Any
    ) -> WorkerProcesses:
        """A worker for the model, ready; its settings but for these changes."""
        worker = self.launch(model, environment, **changes)
        worker.await_ready()
        return worker

    def launch(
        self, model: str = "echo", environment: Mapping[str, str] | None = None, **changes: Any
    ) -> WorkerProcesses:
        """The same, on its way."""
        settings, folder = self.settings.model_copy(update=changes), self._folder / f"worker-{len(self.workers) + 1}"
        worker = WorkerProcesses.launch(settings, model, folder, seen_by=self.settings, environment=environment)
        self._open.callback(worker.close)
        self.workers.append(worker)
        return worker

    @property
    def tables(self) -> Tables:
        """The rows as they are; over a new connection if Postgres has dropped the last one."""
        try:
            if self._tables is not None and self._tables.value("SELECT 1"):
                return self._tables
        except psycopg.OperationalError:
            pass
        self._tables = self._open.enter_context(closing(Tables(str(self.settings.database_url))))
        return self._tables

    def check_connections(self, workers: int) -> None:
        """No more of them to Postgres than so many workers may have, and a few of ours."""
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        assert self.tables.value(sessions) <= workers * CONNECTIONS_OF_A_WORKER + 20

    def wait(self, job_id: UUID) -> Job:
        """The job once it has ended."""
        return self.producer.wait(job_id, PATIENCE_SECONDS)

    def await_all_ended(self) -> None:
        """Wait until no job is open."""
        wait_until(lambda: not self.producer.list(states=_OPEN, limit=1), PATIENCE_SECONDS, "every job has ended")

    def await_state(self, job_ids: Iterable[UUID], state: State) -> None:
        """Wait until all of these are in this state at one time."""
        awaited = set(job_ids)

        def reached() -> bool:
            return awaited <= {job.id for job in self.producer.list(states=[state], limit=10_000)}

        wait_until(reached, PATIENCE_SECONDS, f"{len(awaited)} jobs are {state}")


@contextmanager
def system_on(servers: Addresses, template: str, folder: Path, **changes: Any) -> Iterator[System]:
    """A system on these servers, with an empty database made from the template."""
    with temporary_database(servers.database_url, template) as url, _key_prefix(servers.broker_url) as prefix:
        urls = {"database_url": url, "broker_url": servers.broker_url, "secret": SECRET}
        settings = Settings.load(home=folder / "home", **urls, key_prefix=prefix, **changes)
        with System(settings, folder) as system:
            yield system


@contextmanager
def _key_prefix(broker_url: str) -> Iterator[str]:
    prefix = f"test-{secrets.token_hex(6)}"
    yield prefix
    with redis.Redis.from_url(broker_url) as client:
        keys = list(client.scan_iter(f"{prefix}*", count=1000))
        if keys:
            client.unlink(*keys)
