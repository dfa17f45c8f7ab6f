"""Real workers for tests: supervisor, engine and consumer as processes, seen from outside, gone without a trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import psutil

from headrace import guard
from jobs.database import Database
from jobs.leases import Leases, Worker
from jobs.settings import Settings
from kit.canaries import has_leaked
from kit.waiting import wait_until

START_SECONDS = 120.0
END_SECONDS = 60.0


@dataclass(frozen=True)
class Execution:
    """One request that an engine began to compute."""

    job_id: UUID
    token: UUID  # of the attempt
    engine_pid: int


class WorkerProcesses:
    """One worker. Its three processes are one process group, by which they are found and ended."""

    in_use: ClassVar[set[WorkerProcesses]] = set()  # launched and not closed

    def __init__(self, seen_by: Settings, process: guard.Guarded, folder: Path, temporary: Path) -> None:
        self.log = folder / "log"
        self.health = folder / "health"
        self._execution_log = folder / "executions"
        self._temporary = temporary
        self._process = process
        self._database = Database(str(seen_by.database_url), pool_size=1)
        self._leases = Leases(self._database, seen_by.lease_seconds)
        self.in_use.add(self)

    @classmethod
    def launch(
        cls,
        settings: Settings,
        model: str,
        folder: Path,
        *,
        seen_by: Settings | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> WorkerProcesses:
        """Start one, and do not wait. Its log, execution log and configuration lie in the folder.

        `seen_by`: how the test reaches the servers, if the worker's own way is to fail.
        """
        folder.mkdir(parents=True)
        # What a killed supervisor leaves goes with us. A socket's path has to be short, and the folder's may not be.
        temporary = Path(tempfile.mkdtemp(prefix="headrace-test-"))
        own = {"HEADRACE_CONFIG": str(_write_config(folder, settings.models)), "TMPDIR": str(temporary)}
        own |= environment or {}
        arguments = [
            "--model",
            model,
            "--execution-log",
            str(folder / "executions"),
            "--health",
            str(folder / "health"),
        ]
        with (folder / "log").open("ab") as log:
            process = guard.start(
                [sys.executable, "-m", "workers.supervisor", *arguments],
                env=os.environ | settings.environment() | own | {"PYTHONSAFEPATH": "1"},
                output=log,
                grace_seconds=END_SECONDS,
            )
        return cls(seen_by or settings, process, folder, temporary)

    @property
    def supervisor(self) -> psutil.Process:
        """The supervisor. Raises psutil.NoSuchProcess once it has ended."""
        return psutil.Process(self._process.pid)

    @property
    def engine(self) -> psutil.Process:
        """The engine; waits for it if it is about to be started."""
        return self._await_member("workers.engine")

    @property
    def consumer(self) -> psutil.Process:
        """The Celery consumer; waits for it if it is about to be started."""
        return self._await_member("workers.consumer")

    def members(self) -> list[psutil.Process]:
        """Every process of it that lives."""
        return [process for process in psutil.process_iter() if self._is_member(process)]

    def processes(self) -> set[int]:
        """The same by pid, with the guard that starts and ends it."""
        return {self._process._guard.pid, *(process.pid for process in self.members())}

    def lease(self) -> Worker | None:
        """The running lease of its consumer, the newest if there are several; None before it has one."""
        pids = {process.pid for process in self.members()}
        return next((worker for worker in self._leases.list() if worker.pid in pids), None)

    def await_ready(self) -> Worker:
        """Wait until its lease runs and its engine answers; returns the lease."""
        return wait_until(self._ready, START_SECONDS, f"a worker that is ready; its log is {self.log}")

    @property
    def shows_ready(self) -> bool:
        """Whether a probe would find it ready."""
        return (self.health / "ready").exists()

    def executions(self) -> list[Execution]:
        """Every request that its engines began to compute, in order."""
        if not self._execution_log.exists():
            return []
        lines = [json.loads(line) for line in self._execution_log.read_bytes().splitlines()]
        return [_execution(line) for line in lines]

    def has_begun(self, *job_ids: UUID) -> bool:
        """Whether its engine has worked on every one of these."""
        return set(job_ids) <= {execution.job_id for execution in self.executions()}

    def begin_stop(self) -> None:
        """SIGTERM to the supervisor; does not wait."""
        self._process.signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end of all its processes: the supervisor's exit status."""
        status = self._process.wait(END_SECONDS)
        self.await_gone()
        return status

    def kill(self) -> None:
        """SIGKILL to all its processes at once, as when a machine is lost."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(END_SECONDS)
        self.await_gone()

    def await_gone(self) -> None:
        """Wait until none of its processes lives."""
        wait_until(lambda: not self.members(), END_SECONDS, "all processes of the worker ended")

    def close(self) -> None:
        """End it, in whatever state it is."""
        try:
            self.kill()
        finally:
            self._database.close()
            shutil.rmtree(self._temporary, ignore_errors=True)
            self.in_use.discard(self)
        assert not has_leaked(self.log.read_text(errors="replace")), f"{self.log} holds a secret"

    def _ready(self) -> Worker | None:
        if not self._process.running:
            raise AssertionError(f"the worker ended while starting:\n{self.log.read_text()}")
        lease = self.lease()
        return lease if lease and lease.ready else None

    def _await_member(self, module: str) -> psutil.Process:
        def find() -> psutil.Process | None:
            return next((one for one in self.members() if module in _command(one)), None)

        return wait_until(find, START_SECONDS, f"a process of {module}")

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False


def _write_config(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> Path:
    """`[models.NAME]` tables; strings, numbers and booleans are written in TOML as in JSON."""
    lines = []
    for name, table in models.items():
        lines.append(f"[models.{json.dumps(name)}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    path = folder / "headrace.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _execution(line: dict[str, Any]) -> Execution:
    job_id, _, token = line["id"].partition("/")
    return Execution(UUID(job_id), UUID(token), line["pid"])


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
