"""The state of the whole in a few statements: clocks, workers, routes, rows that nobody looks after."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from sqlalchemy import text

from jobs.database import Database

# A sweep comes every second, and takes such rows back.
_OVERDUE_SECONDS = 30.0
# A row of the ledger has the time at which its transaction began, and is seen once that is committed. None takes so
# long: a statement is given up after 60 s.
_COMMITTED_BY_THEN = timedelta(minutes=2)
_COUNTED = ("jobs", "prompt_tokens", "cached_tokens", "completion_tokens")
_Kind: TypeAlias = tuple[str, str, str]  # model, lane, state


@dataclass(frozen=True, slots=True)
class Route:
    """What waits and runs for one model."""

    model: str
    interactive: int  # queued and due
    bulk: int  # queued, of open batches
    running: int
    oldest_seconds: float  # how long the oldest interactive job has waited since it could start


@dataclass(frozen=True, slots=True)
class Server:
    """Postgres itself, whatever is in it."""

    version: str
    answer_seconds: float
    clock_seconds: float  # how far this machine's clock is ahead of it


@dataclass(frozen=True, slots=True)
class Overview:
    """What one look at the tables found."""

    routes: tuple[Route, ...]
    died: int  # workers whose lease ran out within the last hour
    orphans: int  # rows that run under no live worker, for longer than a sweep may take
    unpublished: int  # interactive rows that have waited for their first message for too long
    failed: int  # jobs that failed within the last day


@dataclass(frozen=True, slots=True)
class OpenJobs:
    """Jobs of one kind that have not ended, of all tenants."""

    model: str
    lane: str
    state: str
    jobs: int
    oldest_seconds: float  # as of `Route`; 0 of every kind but interactive jobs that are queued


@dataclass(frozen=True, slots=True)
class EndedJobs:
    """Jobs of one kind that have ended, of all tenants, and their tokens as they were billed."""

    model: str
    lane: str
    state: str
    jobs: int
    prompt_tokens: int  # cached ones too
    cached_tokens: int
    completion_tokens: int


class Ends:
    """Counts jobs that end from its first look on: the sums only grow. Not thread-safe.

    Each look reads of the ledger what is new, and the last minutes once more: rows of them may still be committed.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._since: datetime | None = None  # what came before is in `_counted`
        self._counted: dict[_Kind, Counter[str]] = {}

    def look(self) -> list[EndedJobs]:
        """The sums as of now. Raises StoreUnavailable; nothing is lost then."""
        [row] = self._database.rows(_NOW)
        since = self._since or row.now
        fresh_since = max(since, row.now - _COMMITTED_BY_THEN)
        found = self._database.rows(_ENDS, {"since": since, "fresh_since": fresh_since})
        self._since = fresh_since
        for ended in found:
            if not ended.fresh:
                _add(self._counted, ended)
        return self._with([ended for ended in found if ended.fresh])

    def _with(self, fresh: list[Any]) -> list[EndedJobs]:
        sums = {kind: counts.copy() for kind, counts in self._counted.items()}
        for ended in fresh:
            _add(sums, ended)
        return [EndedJobs(*kind, *(counts[name] for name in _COUNTED)) for kind, counts in sums.items()]


def _add(sums: dict[_Kind, Counter[str]], ended: Any) -> None:
    counts = sums.setdefault((ended.model, ended.lane, ended.state), Counter())
    counts.update({name: getattr(ended, name) for name in _COUNTED})


def open_jobs(database: Database) -> list[OpenJobs]:
    """What waits and runs, whoever it belongs to. Raises StoreUnavailable."""
    return [OpenJobs(**row._asdict()) for row in database.rows(_OPEN)]


def reach(database: Database) -> Server:
    """Raises StoreUnavailable."""
    database.rows(_SERVER)  # the first one connects, too
    asked_at, began = time.time(), time.monotonic()
    [row] = database.rows(_SERVER)
    answer_seconds = time.monotonic() - began
    return Server(row.version, answer_seconds, asked_at + answer_seconds / 2 - row.clock)


def look(database: Database) -> Overview:
    """Needs the tables of this version. Raises StoreUnavailable."""
    [totals] = database.rows(_TOTALS, {"overdue": _OVERDUE_SECONDS})
    routes = tuple(Route(**route._asdict()) for route in database.rows(_ROUTES))
    return Overview(routes, **totals._asdict())


_SERVER = text("""
SELECT current_setting('server_version') AS version, extract(epoch FROM clock_timestamp())::double precision AS clock
""")

# Functions, for a gateway sees the rows of one tenant at a time (`jobs.access`).
_OPEN = text("SELECT * FROM headrace_open_jobs()")

_NOW = text("SELECT now() AS now")

_ENDS = text("SELECT * FROM headrace_ends(:since, :fresh_since)")

_TOTALS = text("""
SELECT (SELECT count(*) FROM workers WHERE state = 'dead' AND lease_until > now() - interval '1 hour') AS died,
       (SELECT count(*) FROM jobs j WHERE state = 'running' AND NOT EXISTS (
           SELECT 1 FROM workers w WHERE w.id = j.worker_id AND w.lease_until > now() - make_interval(secs => :overdue)
       )) AS orphans,
       (SELECT count(*) FROM jobs WHERE state = 'queued' AND lane = 'interactive' AND published_at IS NULL
           AND run_after < now() - make_interval(secs => :overdue)) AS unpublished,
       (SELECT count(*) FROM jobs WHERE state = 'failed' AND finished_at > now() - interval '1 day') AS failed
""")

_ROUTES = text("""
SELECT model, count(*) FILTER (WHERE state = 'queued' AND lane = 'interactive' AND run_after <= now()) AS interactive,
       count(*) FILTER (WHERE state = 'queued' AND lane = 'bulk') AS bulk,
       count(*) FILTER (WHERE state = 'running') AS running,
       coalesce(extract(epoch FROM now() - min(run_after) FILTER (
           WHERE state = 'queued' AND lane = 'interactive' AND run_after <= now()
       )), 0)::double precision AS oldest_seconds
FROM jobs WHERE state IN ('queued', 'running') GROUP BY model ORDER BY model
""")
