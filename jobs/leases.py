"""Workers' proofs of life. A lease belongs to one incarnation of a worker; a fresh one is made at every start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

from jobs.database import Database
from jobs.errors import Fenced
from jobs.figures import Figures
from jobs.states import WorkerState


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker says of itself at each heartbeat."""

    running: int  # rows it holds
    ready: bool  # its engine answers
    busy_seconds: float  # the engine's total since it started
    refused_messages: int = 0  # that none of us signed, since its process started
    figures: Figures | None = None  # None: those that were told last stand


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a worker learns at a heartbeat."""

    cancelled: tuple[UUID, ...]  # tokens of its rows that were to be cancelled
    backlog: bool  # rows of open batches wait for its model


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker incarnation as others see it."""

    id: UUID
    state: WorkerState
    model: str
    host: str
    pid: int
    slots: int
    running: int
    ready: bool
    info: dict[str, Any]
    busy_seconds: float
    started_at: datetime
    seconds_left: float  # of its lease; negative when it is over
    refused_messages: int = 0
    figures: Figures = field(default_factory=Figures)


class Leases:
    """Every look at and change of a worker's lease."""

    def __init__(self, database: Database, lease_seconds: float) -> None:
        self.database = database
        self.lease_seconds = lease_seconds

    def register(self, worker_id: UUID, *, model: str, host: str, pid: int, slots: int, info: str) -> None:
        """A new incarnation, live from now on. `info` is JSON: what its engine says of itself."""
        fields = {"id": worker_id, "model": model, "host": host, "pid": pid, "slots": slots, "info": info}
        self.database.rows(_REGISTER, fields | self._lease)

    def renew(self, worker_id: UUID, load: Load, held: Sequence[UUID]) -> Renewal:
        """Prove life. `held` are the tokens the worker holds or may hold; its other rows are given back.

        Raises Fenced when the lease was given up: the sweeper took it for dead, or it has stopped.
        """
        fields = {
            "id": worker_id,
            "running": load.running,
            "ready": int(load.ready),
            "busy_seconds": load.busy_seconds,
            "refused_messages": load.refused_messages,
            "figures": None if load.figures is None else orjson.dumps({"figures": load.figures}).decode(),
            "held": list(held),
        }
        return self.database.run(lambda c: self._renew(c, fields), relaxed=True)

    def _renew(self, connection: Connection, fields: dict[str, Any]) -> Renewal:
        row = connection.execute(_RENEW, fields | self._lease).one_or_none()
        if row is None:
            raise Fenced(f"worker {fields['id']} has lost its lease")
        connection.execute(_GIVE_BACK, fields | self._lease)
        cancelled = connection.execute(_TO_STOP, fields).scalars().all()
        return Renewal(tuple(cancelled), row.backlog)

    def drain(self, worker_id: UUID) -> None:
        """The worker claims no more."""
        self._set(worker_id, WorkerState.DRAINING)

    def stop(self, worker_id: UUID) -> None:
        """The worker says goodbye; what it should still hold is the sweeper's at once."""
        self._set(worker_id, WorkerState.STOPPED)

    def bury(self, worker_id: UUID) -> None:
        """The worker's process has ended: if it said no goodbye, what it held is the sweeper's at once."""
        self._set(worker_id, WorkerState.DEAD)

    def _set(self, worker_id: UUID, state: WorkerState) -> None:
        fields = {"id": worker_id, "state": str(state)}
        self.database.rows(_SET_STATE, fields)

    def list(self, *, live: bool = True) -> list[Worker]:
        """Workers, the newest first; `live`: only those whose lease runs."""
        rows = self.database.rows(_LIST, {"live": live})
        return [_worker(row) for row in rows]

    @property
    def _lease(self) -> dict[str, float]:
        return {"lease_seconds": self.lease_seconds}


def _worker(row: Any) -> Worker:
    read = {"state": WorkerState(row.state), "figures": Figures.read(row.figures)}
    return Worker(**(row._asdict() | read))


_REGISTER = text("""
INSERT INTO workers (id, state, model, host, pid, slots, ready, info, lease_until)
VALUES (:id, 'live', :model, :host, :pid, :slots, 1, CAST(:info AS jsonb),
        now() + make_interval(secs => :lease_seconds))
ON CONFLICT (id) DO NOTHING
""")

_RENEW = text("""
UPDATE workers w
SET lease_until = now() + make_interval(secs => :lease_seconds), renewed_at = now(), running = :running,
    ready = :ready, busy_seconds = :busy_seconds, refused_messages = :refused_messages,
    info = info || coalesce(CAST(:figures AS jsonb), '{}')
WHERE id = :id AND state IN ('live', 'draining')
RETURNING EXISTS (
    SELECT 1 FROM batches b WHERE b.state IN ('filling', 'running') AND EXISTS (
        SELECT 1 FROM jobs j
        WHERE j.batch_id = b.id AND j.model = w.model AND j.state = 'queued' AND j.lane = 'bulk'
          AND j.run_after <= now()
    )
) AS backlog
""")

# Rows whose claim was committed although its reply was lost: nobody runs them. Claims younger than a lease are left
# alone: they may have been made after `held` was put together.
_GIVE_BACK = text("""
WITH unheld AS (
    SELECT j.id, j.token FROM jobs j JOIN attempts a ON a.token = j.token
    WHERE j.worker_id = :id AND j.state = 'running' AND NOT j.token = ANY(CAST(:held AS uuid[]))
      AND a.started_at < now() - make_interval(secs => :lease_seconds)
    FOR UPDATE OF j SKIP LOCKED
), queued AS (
    UPDATE jobs j
    SET state = 'queued', token = NULL, worker_id = NULL, published_at = NULL, attempts = attempts - 1
    FROM unheld u WHERE j.id = u.id
    RETURNING u.token
)
UPDATE attempts a SET ended_at = now(), outcome = 'released', error = 'the claim''s reply was lost'
FROM queued q WHERE a.token = q.token AND a.ended_at IS NULL
""")

_TO_STOP = text("""
SELECT token FROM jobs WHERE worker_id = :id AND state = 'running' AND cancel_requested_at IS NOT NULL
""")

_SET_STATE = text("UPDATE workers SET state = :state WHERE id = :id AND state IN ('live', 'draining')")

_LIST = text("""
SELECT id, state, model, host, pid, slots, running, ready = 1 AS ready, info - 'figures' AS info,
       info -> 'figures' AS figures, busy_seconds, started_at,
       extract(epoch FROM lease_until - now())::double precision AS seconds_left, refused_messages
FROM workers
WHERE NOT :live OR (state IN ('live', 'draining') AND lease_until > now())
ORDER BY started_at DESC LIMIT 1000
""")
