"""Proof that this worker still consumes: it sends itself a message through the broker and sees it come back.

A lease proves that the process lives, the engine's health that it computes. Neither shows that messages still arrive: a
connection can stand and bring nothing, a consumer can have been told to stop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

# A message that the broker has taken comes back within milliseconds while a thread is free.
PATIENCE_SECONDS = 5.0
# Of a proof. Messages are sent at every heartbeat.
_FRESH_SECONDS = 8.0


class ConsumptionProof:
    """Call `run_once` regularly; wrap every task in `task`, for whatever arrives is a proof.

    `send` puts a message into this worker's own queue: False if the broker did not take it, None if the worker could
    do nothing with messages now. It counts only while a thread is free: with all of them busy nothing is fetched, and
    rightly so. Without proof for `PATIENCE_SECONDS` the consumer's connections are ended (`hang_up`), so that it dials
    again and jobs run on; if that does not help in the same time, its process is (`give_up`). While the broker takes
    nothing there is nothing to prove.
    """

    def __init__(
        self,
        send: Callable[[], bool | None],
        hang_up: Callable[[], None],
        give_up: Callable[[], None],
        threads: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._hang_up = hang_up
        self._give_up = give_up
        self._threads = threads
        self._clock = clock
        self._lock = threading.Lock()
        self._busy = 0
        self._proven_at = clock()
        self._asked_at: float | None = None  # the first message since the last proof
        self._refused = False  # the last message, by the broker
        self._hung_up = False

    @contextmanager
    def task(self) -> Iterator[None]:
        """A task has arrived, and holds a thread."""
        with self._lock:
            self._busy += 1
            self._proven_at = self._clock()
            self._refused = False
            self._start_over()
        try:
            yield
        finally:
            with self._lock:
                if not self._has_free_thread:
                    self._proven_at = self._clock()  # until now nothing could arrive
                self._busy -= 1

    @property
    def consumes(self) -> bool:
        """Whether messages arrive, as far as can be told; also False while the broker takes none."""
        fresh = self._clock() - self._proven_at < _FRESH_SECONDS
        return not self._has_free_thread or (fresh and not self._refused)

    def run_once(self) -> None:
        """Ask for a proof; act if one is overdue."""
        asked_at = self._clock()
        taken = self._send() if self._has_free_thread else None
        with self._lock:
            self._refused = taken is False
            if not self._has_free_thread or not taken:
                self._start_over()
            elif self._asked_at is None:
                self._asked_at = asked_at
        self._act(self._missing_seconds())

    @property
    def _has_free_thread(self) -> bool:
        return self._busy < self._threads

    def _start_over(self) -> None:
        self._asked_at = None
        self._hung_up = False

    def _missing_seconds(self) -> float:
        asked_at = self._asked_at
        return 0.0 if asked_at is None else self._clock() - asked_at

    def _act(self, missing_seconds: float) -> None:
        if missing_seconds > 2 * PATIENCE_SECONDS:
            log.error("no message has arrived for %.0f s; the consumer is started again", missing_seconds)
            self._give_up()
        elif missing_seconds > PATIENCE_SECONDS and not self._hung_up:
            log.warning("no message has arrived for %.0f s; the consumer dials again", missing_seconds)
            self._hung_up = True
            self._hang_up()
