"""Dead letters in SQL: the jobs that failed for good, why, and under whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import text

from jobs.database import Database
from jobs.errors import NotFound
from jobs.schema import JobRequest
from jobs.tables import LOCAL_TENANT

_DAY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A job that failed, and its last attempt."""

    id: UUID
    model: str
    lane: str
    attempts: int
    code: str
    message: str
    worker_id: UUID | None  # None: it failed without ever running
    host: str | None
    pid: int | None
    finished_at: datetime


class DeadLetters:
    """What failed, of one tenant."""

    def __init__(self, database: Database, tenant_id: str = LOCAL_TENANT) -> None:
        self._database = database
        self._tenant = {"tenant": tenant_id}

    def list(self, *, ids: Sequence[UUID] = (), model: str | None = None, limit: int = 50) -> list[DeadLetter]:
        """The latest first."""
        fields = {"ids": list(ids) or None, "model": model, "limit": limit}
        return [DeadLetter(**row._asdict()) for row in self._database.rows(_LIST, self._tenant | fields)]

    def request(self, job_id: UUID) -> JobRequest:
        """What was asked. Raises NotFound if no such job failed."""
        row = self._database.row(_REQUEST, self._tenant | {"id": job_id})
        if row is None:
            raise NotFound(f"no failed job {job_id}")
        return JobRequest.model_validate_json(row.request)

    def purge(self, *, ids: Sequence[UUID] = (), model: str | None = None, older_than_days: float = 0.0) -> int:
        """Delete them, with what was asked and answered; their bills stay. Returns how many.

        The lines of a batch whose output was not handed over are left: they belong into it.
        """
        fields = {"ids": list(ids) or None, "model": model, "older": older_than_days * _DAY_SECONDS}
        return len(self._database.rows(_PURGE, self._tenant | fields))


_CHOSEN = """
    j.tenant_id = :tenant AND j.state = 'failed'
    AND (CAST(:ids AS uuid[]) IS NULL OR j.id = ANY(CAST(:ids AS uuid[])))
    AND (CAST(:model AS text) IS NULL OR j.model = :model)
"""

_LIST = text(f"""
SELECT j.id, j.model, j.lane, j.attempts, coalesce(r.error ->> 'code', '') AS code,
       coalesce(r.error ->> 'message', '') AS message, a.worker_id, w.host, w.pid, j.finished_at
FROM jobs j JOIN results r ON r.job_id = j.id
LEFT JOIN LATERAL (
    SELECT worker_id FROM attempts WHERE job_id = j.id ORDER BY started_at DESC LIMIT 1
) a ON true
LEFT JOIN workers w ON w.id = a.worker_id
WHERE {_CHOSEN}
ORDER BY j.finished_at DESC LIMIT :limit
""")  # noqa: S608 - composed of constants

_REQUEST = text("""
SELECT p.request::text AS request FROM jobs j JOIN payloads p ON p.job_id = j.id
WHERE j.id = :id AND j.tenant_id = :tenant AND j.state = 'failed'
""")

_PURGE = text(f"""
DELETE FROM jobs j
WHERE {_CHOSEN} AND j.finished_at <= now() - make_interval(secs => :older)
  AND NOT EXISTS (SELECT 1 FROM batches b WHERE b.id = j.batch_id AND b.finished_at IS NULL)
RETURNING j.id
""")  # noqa: S608
