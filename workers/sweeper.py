"""Mends what no living worker will: rows of dead workers, overdue rows, lost messages. Any worker may, one does."""

from __future__ import annotations

import logging

from jobs.dispatch import Dispatcher
from jobs.signals import ENDED, Signals
from jobs.states import Lane
from jobs.store import Store, Swept

log = logging.getLogger(__name__)

_BROKER_SECONDS = 2.0


class Sweeper:
    """One pass a second over what should have moved and has not."""

    def __init__(self, store: Store, dispatcher: Dispatcher, signals: Signals) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._signals = signals

    def run_once(self) -> Swept | None:
        """One sweep. None: another worker sweeps at this moment."""
        swept = self._store.sweep(self._empty_queues())
        if swept is None:
            return None
        if swept.to_publish:
            self._dispatcher.publish(swept.to_publish, _BROKER_SECONDS)
        self._signals.publish(ENDED, swept.ended)
        if any(swept.log_context().values()):
            log.info("swept %s", swept.log_context())
        return swept

    def _empty_queues(self) -> list[str]:
        waiting = self._store.models_waiting()
        return [m for m in waiting if self._dispatcher.depth(m, Lane.INTERACTIVE, _BROKER_SECONDS) == 0]
