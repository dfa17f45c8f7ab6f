"""The shape that every background loop has: a name, a period, and a `run_once` that can be called alone in a test."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jobs.errors import StoreUnavailable

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Loop:
    """Calls `run_once` every `period_seconds` in a thread of its own until stopped; an error skips a turn, no more."""

    name: str
    period_seconds: float
    run_once: Callable[[], object]
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; the first turn comes at once."""
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the turn in progress."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            # From the start of a turn, not its end: a slow turn must not stretch the time between heartbeats.
            due = time.monotonic() + self.period_seconds
            self._turn()

    def _turn(self) -> None:
        try:
            self.run_once()
        except StoreUnavailable as error:
            log.warning("%s: %s", self.name, error)
        except Exception:  # a loop that dies silently would take the worker's lease or the sweeper with it
            log.exception("%s failed; it goes on", self.name)
