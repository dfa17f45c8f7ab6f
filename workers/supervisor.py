"""Keeps one worker's two processes alive: the engine, which holds the model, and the Celery consumer.

    headrace worker --model M --gpus 0
     ├─ engine     CUDA_VISIBLE_DEVICES is set before it starts
     └─ consumer   sees no GPU

No torch and no celery here: what restarts the others must not die of what kills them. Children hold the read end of a
pipe whose other end is here, and end when it closes, so that none is orphaned with a GPU.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from jobs.errors import SettingsError
from jobs.logs import set_up_logging
from jobs.settings import Settings
from models.catalog import Catalog, CatalogError, ModelSpec
from workers.health import HealthFolder

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_STABLE_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 30.0
_QUICK_DEATHS = 3
_SILENT_LEASES = 3


@dataclass(slots=True)
class Child:
    """One process that is started again when it dies, after a pause that doubles while it dies young."""

    name: str
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    due_at: float = 0.0
    young_deaths: int = 0

    def keep(self) -> bool:
        """Start it if it is not running and its pause is over; whether it was started."""
        if self.process is not None and self.process.poll() is not None:
            self._buried(self.process.returncode)
        due = self.process is None and time.monotonic() >= self.due_at
        if due:
            self.start()
        return due

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it now."""
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(self.command, env=self.environment, stdin=subprocess.PIPE)
        log.info("%s started, pid %d", self.name, self.process.pid)

    def _buried(self, status: int) -> None:
        assert self.process is not None
        age = time.monotonic() - self.started_at
        self.young_deaths = self.young_deaths + 1 if age < _STABLE_SECONDS else 1
        pause = min(_LONGEST_PAUSE_SECONDS, 0.5 * 2.0 ** (self.young_deaths - 1))
        log.error("%s ended with status %d after %.0f s; it starts again in %.1f s", self.name, status, age, pause)
        self._let_go()
        self.due_at = time.monotonic() + pause

    def _let_go(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None

    def stop(self, patience_seconds: float) -> None:
        """SIGTERM, then SIGKILL when patience ends."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end within %.0f s; it is killed", self.name, patience_seconds)
            self.process.kill()
            self.process.wait()
        self._let_go()

    def kill(self) -> None:
        """SIGKILL; `keep` starts it again."""
        if self.process is not None:
            self.process.kill()


@dataclass(slots=True)
class Pulse:
    """Whether the consumer still beats: its file's time changes at every heartbeat."""

    path: Path
    longest_silence_seconds: float
    _last: float = 0.0
    _changed_at: float = field(default_factory=time.monotonic)

    def silent(self) -> bool:
        """Whether it has not changed for too long. A file that is not there yet is not silent."""
        try:
            last = self.path.stat().st_mtime
        except FileNotFoundError:
            self._changed_at = time.monotonic()
            return False
        if last != self._last:
            self._last, self._changed_at = last, time.monotonic()
        return self.silent_seconds > self.longest_silence_seconds

    @property
    def silent_seconds(self) -> float:
        """Since it last changed, as far as it was looked at."""
        return time.monotonic() - self._changed_at

    def forget(self) -> None:
        """The next consumer begins anew."""
        self.path.unlink(missing_ok=True)
        self._changed_at = time.monotonic()


class Supervisor:
    """One worker: an engine and a consumer."""

    def __init__(
        self,
        settings: Settings,
        spec: ModelSpec,
        gpus: str | None,
        folder: Path,
        *,
        execution_log: Path | None = None,
        health: Path | None = None,
    ) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._socket = folder / "engine.sock"
        self._health = HealthFolder(health or folder)
        self._health.clear()
        self._engine_came_up = False
        shared = ["--socket", str(self._socket), "--spec", spec.model_dump_json()]
        logged = [] if execution_log is None else ["--execution-log", str(execution_log)]
        self.engine = Child("engine", _python("workers.engine", *shared, *logged), _environment(gpus))
        self.consumer = Child(
            "consumer",
            _python("workers.consumer", *shared, "--health", str(self._health.folder)),
            _environment("") | settings.environment(),
        )
        self._pulse = Pulse(self._health.folder / "consumer", _SILENT_LEASES * settings.lease_seconds)

    def run(self) -> int:
        """Until asked to stop, or the engine cannot be started. Returns the exit status."""
        try:
            while not self._stopping.wait(_POLL_SECONDS):
                self._health.alive("supervisor")
                self._keep_engine()
                if self.consumer.keep():
                    self._pulse.forget()
                if not self.consumer.running or self._pulse.silent_seconds > self._settings.lease_seconds:
                    self._health.ready = False  # it cannot say so itself
                if self._engine_never_comes_up():
                    log.error("the engine could not be started in %d tries; giving up", _QUICK_DEATHS)
                    return 1
                self._check_pulse()
        finally:
            self._stop_children()
            self._health.clear()
        return 0

    def stop(self, *_: int | FrameType | None) -> None:
        """Drain and end. Safe in a signal handler."""
        self._stopping.set()

    def _keep_engine(self) -> None:
        if self.engine.keep():
            self._socket.unlink(missing_ok=True)  # of the one before
        # It listens once its model is loaded. One that served, and died of a job, need not be waited for.
        elif self._socket.exists():
            self._engine_came_up = True
            self.engine.young_deaths = 0

    def _engine_never_comes_up(self) -> bool:
        return not self._engine_came_up and self.engine.young_deaths >= _QUICK_DEATHS

    def _check_pulse(self) -> None:
        if self._pulse.silent():
            log.error("the consumer stopped answering; it is started again, the engine keeps its model")
            self.consumer.kill()
            self._pulse.forget()

    def _stop_children(self) -> None:
        self.consumer.stop(self._settings.drain_seconds + self._settings.lease_seconds)
        self.engine.stop(self._settings.lease_seconds)


def run(model: str, gpus: str | None, execution_log: Path | None = None, health: Path | None = None) -> int:
    """Serve the model until SIGTERM or SIGINT. Raises SettingsError if it is in no catalog.

    `health`: the folder where probes look (see `workers.health`).
    """
    settings = Settings.load()
    spec = _spec(settings, model)
    # Short, private and gone with the process: a Unix socket's path has room for about 100 bytes.
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        supervisor = Supervisor(settings, spec, gpus, Path(folder), execution_log=execution_log, health=health)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, supervisor.stop)
        return supervisor.run()


def _spec(settings: Settings, model: str) -> ModelSpec:
    if settings.database_url is None:
        raise SettingsError("HEADRACE_DATABASE_URL", "is not set; a worker needs the two servers of a stack")
    try:
        spec = Catalog.from_mapping(settings.models).get(model)
        fraction = spec.gpu_memory_fraction or settings.gpu_memory_fraction
        return spec.model_copy(update={"gpu_memory_fraction": fraction})
    except CatalogError as error:
        raise SettingsError(f"models.{model}", str(error)) from None


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _environment(gpus: str | None) -> dict[str, str]:
    """The environment of a child; `gpus` None leaves the choice to the driver, "" hides every GPU."""
    inherited = dict(os.environ)
    return inherited if gpus is None else inherited | {"CUDA_VISIBLE_DEVICES": gpus}


def main(arguments: list[str] | None = None) -> int:
    """`python -m workers.supervisor --model M [--gpus 0]`."""
    parser = argparse.ArgumentParser(prog="python -m workers.supervisor")
    parser.add_argument("--model", required=True, help="name in the catalog, folder or hub id")
    parser.add_argument("--gpus", help="CUDA device numbers of this worker, such as 0 or 0,1")
    parser.add_argument("--execution-log", type=Path, help="append a line for each request that is computed")
    parser.add_argument("--health", type=Path, metavar="FOLDER", help="show there that it lives and is ready")
    options = parser.parse_args(arguments)
    set_up_logging("supervisor")
    try:
        return run(options.model, options.gpus, options.execution_log, options.health)
    except SettingsError as error:
        log.error("%s", error)  # noqa: TRY400 - the message says it all
        return 2


if __name__ == "__main__":
    sys.exit(main())
