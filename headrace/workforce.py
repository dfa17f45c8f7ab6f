"""The workers that this process has started: one supervisor for each model, seen through their leases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, Self
from uuid import UUID

from headrace.children import Keeper, Program, await_answer, stop_all
from headrace.tellers import Silent, Teller
from jobs.database import Database
from jobs.errors import StoreUnavailable
from jobs.home import Home, StackError, child_environment
from jobs.leases import Leases, Worker
from jobs.settings import Settings
from jobs.states import WorkerState

SUPERVISOR = "workers.supervisor"
# Beyond its drain and a lease for each of its two processes, which is what the supervisor grants them.
_GOODBYE_SECONDS = 5.0
# Beyond its engine's start: interpreter, connections, registration.
_WORKER_START_SECONDS = 60.0
_LOG_NAME_CHARACTERS = 100


class _Worker(NamedTuple):
    program: Program
    keeper: Keeper


class Workforce:
    """Starts, keeps and ends workers. A context manager; the settings name the servers. Thread-safe."""

    def __init__(self, settings: Settings, *, gpus: str | None = None, teller: Teller | None = None) -> None:
        assert settings.database_url is not None
        self._settings = settings
        self._gpus = gpus
        self._teller = teller or Silent()
        self._database = Database(settings.database_url, settings.store_wait_seconds, pool_size=1)
        self._leases = Leases(self._database, settings.lease_seconds)
        self._earlier: set[UUID] = set()
        self._workers: dict[str, _Worker] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        # A worker of a stack that was killed looks alive until its lease ends. It is none of ours.
        self._earlier = {worker.id for worker in self._leases.list(live=False)}
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._workers:
                with self._teller.step("stopping workers"):
                    stop_all([worker.program for worker in self._workers.values()])
        finally:
            self._database.close()

    def start(self, model: str) -> None:
        """Start a worker for the model, unless there is one of ours. Does not wait for it."""
        with self._lock:
            if model not in self._workers:
                self._workers[model] = self._started(model)

    def _started(self, model: str) -> _Worker:
        gpus = [] if self._gpus is None else ["--gpus", self._gpus]
        program = Program(
            f"worker {model}",
            [SUPERVISOR, "--model", model, *gpus],
            environment=child_environment(self._settings),
            log=Home(self._settings.home).log(f"worker-{model[-_LOG_NAME_CHARACTERS:]}"),
            grace_seconds=self._settings.drain_seconds + 2 * self._settings.lease_seconds + _GOODBYE_SECONDS,
        )
        program.start()
        return _Worker(program, Keeper(program, self._teller.note))

    def await_ready(self) -> None:
        """Wait until every worker's engine answers. Raises StackError if one ends before, or takes too long."""
        patience_seconds = self._settings.engine_start_seconds + _WORKER_START_SECONDS
        for model, worker in self._workers.items():
            with self._teller.step(worker.program.name):
                await_answer(worker.program, partial(self._is_ready, model), patience_seconds)

    def check(self) -> None:
        """Start again what has ended. Raises StackError once that does not help, or if it never got ready."""
        with self._lock:
            for model, worker in self._workers.items():
                if not worker.program.running and not self._was_ready(model):
                    raise StackError(f"{worker.program.name} ended while starting.{worker.program.last_words()}")
                worker.keeper.check()

    def models_served(self) -> set[str]:
        """Models with a live worker, whoever started it. Raises StoreUnavailable."""
        return {worker.model for worker in self._leases.list() if worker.state is WorkerState.LIVE}

    def _is_ready(self, model: str) -> bool:
        return any(lease.ready and lease.state is WorkerState.LIVE for lease in self._own(model, live=True))

    def _was_ready(self, model: str) -> bool:
        try:
            return any(self._own(model, live=False))
        except StoreUnavailable:  # while the store is away nobody gets ready; that is not the worker's fault
            return True

    def _own(self, model: str, *, live: bool) -> Iterator[Worker]:
        for lease in self._leases.list(live=live):
            if lease.model == model and lease.id not in self._earlier:
                yield lease
