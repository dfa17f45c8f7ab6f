"""Whether a request is taken in now: how much waits, and whether anybody would serve it.

Looked up once a second for the whole process, not for each request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from anyio.to_thread import run_sync

from jobs.errors import StoreUnavailable
from jobs.states import WorkerState
from producer.client import Producer
from producer.gateway.errors import SERVER, ApiError, retry_after

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
# Nobody served a model when it was looked at; a worker may have come since.
_LOOK_AGAIN_SECONDS = 0.25
_NO_WORKER_RETRY_SECONDS = 10
_STORE_RETRY_SECONDS = 5


class Admission:
    """What this process knows of queues and workers."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._most_waiting = producer.settings.gateway_waiting_jobs
        self._slots: Counter[str] = Counter()  # of live workers, by model
        self._waiting: Counter[str] = Counter()
        self._looked_at = 0.0
        self._looking = asyncio.Lock()
        self.store_answers = False

    async def run(self) -> None:
        """Look, again and again."""
        while True:
            await self.look(0.0)
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self, older_than_seconds: float) -> None:
        """Look once, unless somebody just did."""
        async with self._looking:
            if time.monotonic() - self._looked_at < older_than_seconds:
                return
            try:
                self._slots, self._waiting = await run_sync(self._found)
                self.store_answers = True
            except StoreUnavailable as error:
                log.warning("the load is not known: %s", error)
                self.store_answers = False
            self._looked_at = time.monotonic()

    def _found(self) -> tuple[Counter[str], Counter[str]]:
        slots: Counter[str] = Counter()
        for worker in self._producer.leases.list():
            if worker.state is WorkerState.LIVE:
                slots[worker.model] += worker.slots
        return slots, Counter(self._producer.store.waiting())

    @property
    def served(self) -> set[str]:
        """Models with a live worker."""
        return set(self._slots)

    async def admit(self, model: str, *, foreground: bool, jobs: int = 1) -> None:
        """Raises ApiError: 503 if Postgres is away or nobody would serve it now, 429 if too much waits already."""
        if not self.store_answers:
            await self.look(_LOOK_AGAIN_SECONDS)
        if not self.store_answers:
            raise _unavailable("The store does not answer at the moment.", "store_unavailable", _STORE_RETRY_SECONDS)
        if foreground and model not in self._slots:
            await self.look(_LOOK_AGAIN_SECONDS)
            if model not in self._slots:
                raise _unavailable(
                    f"No worker serves {model!r} at the moment.", "model_not_served", _NO_WORKER_RETRY_SECONDS
                )
        if self._waiting[model] + jobs > self._most_waiting:
            raise self._full(model)
        # Until the next look, which will count them.
        self._waiting[model] += jobs

    def _full(self, model: str) -> ApiError:
        # As if each took a second: nobody knows how long they take, and clients come back within a minute anyway.
        seconds = self._waiting[model] / (self._slots[model] or 1)
        return ApiError(
            429,
            f"{self._waiting[model]:,} requests wait for {model!r} already.",
            kind="requests",
            code="rate_limit_exceeded",
            headers=retry_after(seconds),
        )


def _unavailable(message: str, code: str, seconds: float) -> ApiError:
    return ApiError(503, message, kind=SERVER, code=code, headers=retry_after(seconds))
