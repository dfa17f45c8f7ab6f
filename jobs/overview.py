"""The state of the whole in a few statements: clocks, workers, routes, rows that nobody looks after."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import text

from jobs.database import Database

# A sweep comes every second, and takes such rows back.
_OVERDUE_SECONDS = 30.0


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
