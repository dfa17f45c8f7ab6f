"""What a worker shows of itself in a folder, for whoever probes it without a database: Kubernetes, systemd, a script.

    supervisor, consumer, engine    liveness: touched every few seconds while that process does its work
    ready                           readiness: is there while the worker takes jobs

Ready: the lease runs, the engine answers and is not stuck in a step, messages arrive, and it does not drain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Process = Literal["supervisor", "consumer", "engine"]
READY = "ready"


class HealthFolder:
    """The folder; made if it is not there. Nothing that an earlier worker left in it counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Nobody lives and nobody is ready."""
        for name in ("supervisor", "consumer", "engine", READY):
            (self.folder / name).unlink(missing_ok=True)

    def alive(self, process: Process) -> None:
        """That process does its work at this moment."""
        (self.folder / process).touch()

    @property
    def ready(self) -> bool:
        """Whether the worker takes jobs."""
        return (self.folder / READY).exists()

    @ready.setter
    def ready(self, ready: bool) -> None:
        if ready:
            (self.folder / READY).touch()
        else:
            (self.folder / READY).unlink(missing_ok=True)
