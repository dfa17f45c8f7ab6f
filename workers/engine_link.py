"""The way to this worker's engine process: connects, connects again after a restart, ends an engine that hangs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from models.client import EngineClient, OnEvent
from models.protocol import Ended, EngineError, GenerationRequest, Health
from workers.watchdog import Watchdog

log = logging.getLogger(__name__)

_DIAL_SECONDS = 1.0
_HEALTH_SECONDS = 1.0


class EngineLink:
    """Always the current connection. While there is none, requests end at once as "released": nothing ran."""

    def __init__(self, socket_path: Path, watchdog: Watchdog) -> None:
        self._path = socket_path
        self._watchdog = watchdog
        self._client: EngineClient | None = None
        self._stop = threading.Event()
        self.ready = threading.Event()
        self.busy_seconds = 0.0  # of every engine since `open`, as far as `health` was asked
        self._last: Health | None = None
        self._heard: Health | None = None  # the last word of the engine that is connected, from then on
        self._heard_at = 0.0
        self._thread = threading.Thread(target=self._keep_connected, name="engine-link", daemon=True)

    def open(self, timeout_seconds: float) -> Health:
        """Wait for the engine. Raises EngineError if it is not there in time."""
        health = self._last = self._connect(timeout_seconds)
        self._thread.start()
        return health

    def submit(self, requests: Sequence[tuple[GenerationRequest, OnEvent]]) -> None:
        """Every request gets its `Ended`, whatever becomes of the engine."""
        client = self._client
        if client is not None:
            client.submit_many(requests)
            return
        for request, on_event in requests:
            on_event(Ended(request.id, "released"))

    @property
    def open_requests(self) -> int:
        """How many the engine works on."""
        client = self._client
        return 0 if client is None else client.open_requests

    def cancel(self, request_id: str) -> None:
        """End a request within one step; unknown ids are ignored."""
        if self._client is not None:
            self._client.cancel(request_id)

    def drain(self) -> None:
        """End as released what no step has touched."""
        if self._client is not None:
            self._client.drain()

    def health(self) -> Health | None:
        """The engine's own word; None while there is no engine, or it does not answer. One that hangs is killed."""
        client = self._client
        if client is None:
            return None
        health = self._ask(client)
        heard = health or self._heard
        assert heard is not None
        stuck_seconds = self._stuck_seconds(client, health)
        if stuck_seconds > self._watchdog.patience_seconds(heard):
            self._kill(heard.pid, stuck_seconds)
            return None
        return health

    def close(self) -> None:
        """Hang up."""
        self._stop.set()
        if self._client is not None:
            self._client.close()
        if self._thread.is_alive():
            self._thread.join()

    def _connect(self, timeout_seconds: float) -> Health:
        client = EngineClient(self._path)
        health = client.connect(timeout_seconds)
        self._hear(health)
        self._client = client
        self.ready.set()
        return health

    def _ask(self, client: EngineClient) -> Health | None:
        try:
            health = client.health(_HEALTH_SECONDS)
        except EngineError:
            return None
        self._take_note(health)
        return health

    def _stuck_seconds(self, client: EngineClient, health: Health | None) -> float:
        """How long one step has lasted, or nothing was answered although the connection stands."""
        if health is not None:
            return health.step_seconds or 0.0
        return 0.0 if client.lost.is_set() else time.monotonic() - self._heard_at

    def _take_note(self, health: Health) -> None:
        """Add what the engine has worked since it was asked last; one that is new has worked for us alone."""
        assert self._last is not None
        earlier = self._last.busy_seconds if self._last.started_at == health.started_at else 0.0
        self.busy_seconds += health.busy_seconds - earlier
        self._last = health
        self._hear(health)

    def _hear(self, health: Health) -> None:
        self._heard, self._heard_at = health, time.monotonic()
        self._watchdog.learn(health)

    def _kill(self, pid: int, stuck_seconds: float) -> None:
        log.error("the engine has not moved for %.0f s; its process is killed", stuck_seconds)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # its supervisor starts a new one

    def _keep_connected(self) -> None:
        while not self._stop.is_set():
            client = self._client
            if client is not None:
                client.lost.wait()
                self.ready.clear()
                self._client = None
                if not self._stop.is_set():
                    log.warning("the engine is lost; waiting for the next one")
            self._dial()

    def _dial(self) -> None:
        try:
            if not self._stop.is_set():
                self._connect(_DIAL_SECONDS)
                log.info("the engine is back")
        except EngineError:
            pass
