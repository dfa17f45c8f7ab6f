"""The way to this worker's engine process: connects, connects again after a restart, ends an engine that hangs."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from models.client import EngineClient, OnEvent
from models.protocol import Ended, EngineError, Failure, GenerationRequest, Health

log = logging.getLogger(__name__)

_DIAL_SECONDS = 1.0
_HEALTH_SECONDS = 1.0


class EngineLink:
    """Always the current connection. While there is none, requests end at once as "engine_lost"."""

    def __init__(self, socket_path: Path, hang_seconds: float) -> None:
        self._path = socket_path
        self._hang_seconds = hang_seconds
        self._client: EngineClient | None = None
        self._stop = threading.Event()
        self.ready = threading.Event()
        self._thread = threading.Thread(target=self._keep_connected, name="engine-link", daemon=True)

    def open(self, timeout_seconds: float) -> Health:
        """Wait for the engine. Raises EngineError if it is not there in time."""
        health = self._connect(timeout_seconds)
        self._thread.start()
        return health

    def submit(self, requests: Sequence[tuple[GenerationRequest, OnEvent]]) -> None:
        """Every request gets its `Ended`, whatever becomes of the engine."""
        client = self._client
        if client is not None:
            client.submit_many(requests)
            return
        for request, on_event in requests:
            on_event(
                Ended(request.id, "failed", error=Failure("engine_lost", "the engine is starting", retryable=True))
            )

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
        try:
            health = client.health(_HEALTH_SECONDS)
        except EngineError:
            return None
        if health.step_seconds is not None and health.step_seconds > self._hang_seconds:
            log.error("the engine hangs in a step for %.0f s; its process is killed", health.step_seconds)
            os.kill(health.pid, signal.SIGKILL)  # its supervisor starts a new one
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
        self._client = client
        self.ready.set()
        return health

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
