"""Who serves a bulk run: the stack that is configured or up, helped by workers of our own, or a private stack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from headrace.stack import Stack
from headrace.tellers import Teller
from headrace.workforce import Workforce
from jobs.errors import StoreUnavailable
from jobs.home import DEFAULT_MODEL, Home, NoStack, connected_settings
from jobs.settings import Settings

_LOOK_SECONDS = 2.0
# A model that had a live worker counts as served until none was seen for so many leases: a worker that is started again
# leaves a gap, and one that was killed looks alive for a lease.
_PATIENCE_LEASES = 2.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What a run needs. Call `check` every few seconds; `serve` may be called in another thread."""

    settings: Settings  # names the servers
    private: bool  # whether the stack is the run's own, and ends with it
    default_model: str  # of requests that name none
    serve: Callable[[str], None]
    """See to it that the model has a worker, from now on. Does not wait for it."""
    check: Callable[[], None]
    """Start again what has ended. Raises StackError once that does not help."""


@contextmanager
def serving(settings: Settings, *, gpus: str | None, teller: Teller) -> Iterator[Serving]:
    """What is up is used, and what it lacks is added; else a stack is started. What was started ends with the context.

    Raises what `headrace.stack.Stack` raises.
    """
    try:
        connected = connected_settings(settings)
    except NoStack:
        with Stack(settings, gpus=gpus, with_flower=False, command="run", teller=teller) as stack:
            yield Serving(stack.settings, True, DEFAULT_MODEL, stack.workforce.start, stack.check)
        return
    with Workforce(connected, gpus=gpus, teller=teller) as workforce:
        kept = _kept_by_stack(settings)
        helper = _Helper(workforce, kept, _PATIENCE_LEASES * settings.lease_seconds, teller)
        yield Serving(connected, False, kept[0] if len(kept) == 1 else DEFAULT_MODEL, helper.serve, helper.check)


def _kept_by_stack(settings: Settings) -> list[str]:
    """Models whose workers somebody else starts again."""
    record = None if settings.database_url else Home(settings.home).record()
    return [] if record is None else record.models


class _Helper:
    """Starts a worker for each wanted model that has none."""

    def __init__(
        self,
        workforce: Workforce,
        kept: Sequence[str],
        patience_seconds: float,
        teller: Teller,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workforce = workforce
        self._kept = kept
        self._patience_seconds = patience_seconds
        self._teller = teller
        self._clock = clock
        self._last_seen: dict[str, float] = {}  # when each model of others' workers was last served
        self._next_look = 0.0

    def serve(self, model: str) -> None:
        if model in self._kept:
            return
        with suppress(StoreUnavailable):
            self._look(model, patience_seconds=0.0)

    def check(self) -> None:
        self._workforce.check()
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            with suppress(StoreUnavailable):
                for model in list(self._last_seen):
                    self._look(model, self._patience_seconds)

    def _look(self, model: str, patience_seconds: float) -> None:
        now = self._clock()
        seen = self._last_seen.setdefault(model, now)
        if model in self._workforce.models_served():
            self._last_seen[model] = now
        elif now - seen >= patience_seconds:
            del self._last_seen[model]
            self._teller.note(f"no worker serves {model}; starting one")
            self._workforce.start(model)
