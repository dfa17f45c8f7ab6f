"""Batches in SQL: a file of any length comes in by COPY, chunk by chunk, and goes out some lines at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

from jobs.database import Database, driver_of, is_held_to_row_security
from jobs.errors import NotFound
from jobs.ids import line_id
from jobs.schema import Choice, JobError, JobRequest, Usage
from jobs.states import BatchState, State
from jobs.store import END_WAITING_ROWS, EXPIRE_WAITING_ROWS, STOP_RUNNING_ROWS, Reservation
from jobs.tables import LOCAL_TENANT

READ_LINES = 500
CANCEL_ROWS = 5000


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a batch's input that is a good request."""

    number: int  # from 1
    custom_id: str
    request: JobRequest
    max_attempts: int
    endpoint: str | None = None  # the route it was written for
    reservation: Reservation | None = None  # of a key's quota; all lines of a chunk have one, or none has


@dataclass(frozen=True, slots=True)
class Rejection:
    """One line that is not; it becomes no job."""

    number: int
    custom_id: str | None  # None: what the line calls itself belongs to another
    error: JobError
    field: str


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as its owner sees it."""

    id: UUID
    tenant_id: str
    state: BatchState
    source: dict[str, Any]
    input_offset: int  # bytes of the input taken in
    input_lines: int  # lines taken in, bad ones too
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch has come, in rows."""

    states: dict[State, int]
    rejected: int

    @property
    def total(self) -> int:
        """Lines taken in."""
        return sum(self.states.values()) + self.rejected

    @property
    def ended(self) -> int:
        """Lines that have their end, rejected ones too."""
        return sum(count for state, count in self.states.items() if state.final) + self.rejected

    @property
    def failed(self) -> int:
        """Lines that ended without success."""
        return self.ended - self.states.get(State.SUCCEEDED, 0)


@dataclass(frozen=True, slots=True)
class Ended:
    """One ended job of a batch: of a `Job` what a line of the output is made of, and not validated again."""

    id: UUID
    line: int
    custom_id: str
    endpoint: str | None
    state: State
    model: str
    created_at: datetime
    finished_at: datetime
    metadata: dict[str, str]
    choices: tuple[Choice, ...]
    usage: Usage
    error: JobError | None
    served_by: str | None
    conversation: None = None  # a batch has no turns
    call: None = None  # nor did its requests come over the API by themselves

    @property
    def text(self) -> str:
        """The first choice's text; empty if there is none."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True, slots=True)
class Page:
    """Some consecutive lines of a batch, all ended."""

    jobs: list[Ended]
    last: int  # line, the page's last one, whether or not it became a job


@dataclass(frozen=True, slots=True)
class Summary:
    """What a batch came to. Seconds, tokens, dollars."""

    succeeded: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    busy_seconds: float
    token_dollars: float
    machine_dollars: float
    latency_p50_seconds: float | None  # claim to end, of the rows that succeeded
    latency_p95_seconds: float | None
    first_started_at: datetime | None
    last_finished_at: datetime | None


class Batches:
    """Every change of and look at a batch of one tenant. Another tenant's batch is as if there were none."""

    def __init__(self, database: Database, tenant_id: str = LOCAL_TENANT) -> None:
        self.database = database
        self.tenant_id = tenant_id

    def _fields(self, batch_id: UUID, **more: Any) -> dict[str, Any]:
        return {"id": batch_id, "tenant": self.tenant_id} | more

    def open(self, batch_id: UUID, source: dict[str, Any]) -> Batch:
        """Make the batch, or go on with it where it stands: a paused one runs again."""
        fields = self._fields(batch_id, source=orjson.dumps(source).decode())
        self.database.rows(_OPEN, fields)
        self.database.rows(_RESUME, fields)
        return self.get(batch_id)

    def get(self, batch_id: UUID) -> Batch:
        """The batch. Raises NotFound."""
        row = self.database.row(_GET, self._fields(batch_id))
        if row is None:
            raise NotFound(f"no batch {batch_id}")
        return Batch(**(row._asdict() | {"state": BatchState(row.state)}))

    def known(self, batch_id: UUID, custom_ids: Sequence[str]) -> set[str]:
        """Which of these belong to lines, good or bad, of an earlier chunk of the batch."""
        jobs = [line_id(batch_id, custom_id) for custom_id in custom_ids]
        fields = self._fields(batch_id, jobs=jobs, custom_ids=list(custom_ids))
        return {row.custom_id for row in self.database.rows(_KNOWN, fields)}

    def take_in(
        self,
        batch: Batch,
        lines: Sequence[Line],
        rejections: Sequence[Rejection],
        *,
        start_offset: int,
        end_offset: int,
        last_line: int,
    ) -> None:
        """Commit one chunk and how far the input was read, both or neither. A chunk committed before does nothing."""
        metered = any(line.reservation for line in lines)
        rows = [_job_row(batch, line) for line in lines]
        payloads = [_payload_row(batch, line) for line in lines]
        refused = [_rejection_row(batch, rejection) for rejection in rejections]
        deadlines = _deadlines(batch, lines)
        step = self._fields(batch.id, start=start_offset, end=end_offset, last_line=last_line)

        def work(connection: Connection) -> None:
            if connection.execute(_ADVANCE, step).one_or_none() is None:
                return
            _insert(connection, _METERED_JOBS if metered else _JOBS, rows)
            if deadlines["ids"]:
                connection.execute(_SET_DEADLINES, deadlines)
            _insert(connection, _PAYLOADS, payloads)
            _insert(connection, _REJECTIONS, refused)

        self.database.run(work)

    def filled(self, batch_id: UUID) -> None:
        """The whole input is in."""
        self._set(batch_id, BatchState.RUNNING, [BatchState.FILLING])

    def pause(self, batch_id: UUID) -> None:
        """Rows that wait go on waiting until the batch is opened again."""
        self._set(batch_id, BatchState.PAUSED, [BatchState.FILLING, BatchState.RUNNING])

    def finish(self, batch_id: UUID) -> None:
        """The output was handed over."""
        self._set(batch_id, BatchState.FINISHED, [BatchState.FILLING, BatchState.RUNNING, BatchState.PAUSED])

    def cancel(self, batch_id: UUID) -> None:
        """Rows that wait end at once, running ones are stopped by their workers. May be repeated."""
        self._set(batch_id, BatchState.CANCELLED, [BatchState.FILLING, BatchState.RUNNING, BatchState.PAUSED])
        self.database.rows(STOP_RUNNING_ROWS, self._fields(batch_id))
        some = self._fields(batch_id, limit=CANCEL_ROWS)
        while self.database.rows(END_WAITING_ROWS, some):
            pass

    def expire(self, batch_id: UUID) -> None:
        """End rows that wait and are past their deadline; a sweeper does it sooner, if a worker lives."""
        some = {"id": batch_id, "limit": CANCEL_ROWS}
        while self.database.rows(EXPIRE_WAITING_ROWS, some):
            pass

    def _set(self, batch_id: UUID, state: BatchState, allowed: Sequence[BatchState]) -> None:
        fields = self._fields(batch_id, state=str(state), allowed=[str(one) for one in allowed])
        self.database.rows(_SET_STATE, fields)

    def progress(self, batch_id: UUID) -> Progress:
        """Rows by state."""
        rows = self.database.rows(_PROGRESS, self._fields(batch_id))
        counts = {row.state: row.rows for row in rows}
        rejected = counts.pop("rejected", 0)
        return Progress({State(name): rows for name, rows in counts.items()}, rejected)

    def models(self, batch_id: UUID) -> list[str]:
        """Models that rows of the batch still wait for."""
        return [row.model for row in self.database.rows(_MODELS, self._fields(batch_id))]

    def summary(self, batch_id: UUID) -> Summary:
        """What it came to so far."""
        return Summary(**self.database.row(_SUMMARY, self._fields(batch_id))._asdict())

    def samples(self, batch_id: UUID, count: int) -> list[tuple[JobRequest, str]]:
        """The first requests of the input that succeeded, each with its first answer."""
        rows = self.database.rows(_SAMPLES, self._fields(batch_id, limit=count))
        return [(JobRequest.model_validate(row.request), row.choices[0]["text"]) for row in rows]

    # Some lines at a time: an index finds them however long the batch is and whatever the planner knows of it. A cursor
    # over a million rows sorted them first, in one statement that a timeout ends; nor could it go on after a fault.

    def outputs(self, batch_id: UUID, after: int) -> Page | None:
        """The jobs of the next lines in the order of the input; None: some have not ended. The input has to be in."""
        last = after + READ_LINES
        fields = self._fields(batch_id, after=after, last=last)
        if self.database.rows(_UNFINISHED, fields):
            return None
        return Page([_ended_of(row) for row in self.database.rows(_OUTPUTS, fields)], last)

    def rejected(self, batch_id: UUID, after: int) -> list[Rejection]:
        """The next lines that became no job, in order; none are left if there are none."""
        fields = self._fields(batch_id, after=after, limit=READ_LINES)
        return [_rejection_of(row) for row in self.database.rows(_REJECTED, fields)]


def _job_row(batch: Batch, line: Line) -> tuple[Any, ...]:
    request = line.request
    return (
        line_id(batch.id, line.custom_id),
        batch.tenant_id,
        str(State.QUEUED),
        request.model,
        "bulk",
        request.priority,
        line.max_attempts,
        batch.id,
        line.number,
        *(() if line.reservation is None else (line.reservation.key_id, line.reservation.tokens)),
    )


def _deadlines(batch: Batch, lines: Sequence[Line]) -> dict[str, list[Any]]:
    limited = [line for line in lines if line.request.deadline_seconds is not None]
    return {
        "ids": [line_id(batch.id, line.custom_id) for line in limited],
        "seconds": [line.request.deadline_seconds for line in limited],
    }


def _payload_row(batch: Batch, line: Line) -> tuple[Any, ...]:
    request, payload = line.request, line.request.payload()
    return (
        line_id(batch.id, line.custom_id),
        batch.tenant_id,
        line.custom_id,
        line.endpoint,
        payload,
        request.metadata_payload(),
        request.findings_payload(),
        request.digest(payload),
    )


def _rejection_row(batch: Batch, rejection: Rejection) -> tuple[Any, ...]:
    error = {"code": rejection.error.code, "message": rejection.error.message, "field": rejection.field}
    return (batch.id, rejection.number, batch.tenant_id, rejection.custom_id, orjson.dumps(error).decode())


def _ended_of(row: Any) -> Ended:
    return Ended(
        id=row.id,
        line=row.line,
        custom_id=row.custom_id,
        endpoint=row.endpoint,
        state=State(row.state),
        model=row.model,
        created_at=row.created_at,
        finished_at=row.finished_at,
        metadata=row.metadata or {},
        choices=tuple(Choice(**choice) for choice in row.choices),
        usage=Usage(**row.usage),
        error=row.error and JobError(**row.error),
        served_by=row.served_by,
    )


def _rejection_of(row: Any) -> Rejection:
    error = JobError(code=row.error["code"], message=row.error["message"])
    return Rejection(row.line, row.custom_id, error, row.error["field"])


def _insert(connection: Connection, table: _Table, rows: Sequence[tuple[Any, ...]]) -> None:
    """By COPY, the fastest; Postgres refuses that to whom it holds to row security, who inserts arrays."""
    if not rows:
        return
    with driver_of(connection).cursor() as cursor:
        if is_held_to_row_security(connection):
            cursor.execute(table.insert, [list(column) for column in zip(*rows, strict=True)])
            return
        with cursor.copy(table.copy) as copy:
            for row in rows:
                copy.write_row(row)


@dataclass(frozen=True, slots=True)
class _Table:
    """Where rows of a chunk go."""

    name: str
    columns: dict[str, str]  # and their types

    @property
    def copy(self) -> str:
        return f"COPY {self.name} ({', '.join(self.columns)}) FROM STDIN"

    @property
    def insert(self) -> str:
        arrays = ", ".join(f"%s::{kind}[]" for kind in self.columns.values())
        return f"INSERT INTO {self.name} ({', '.join(self.columns)}) SELECT * FROM unnest({arrays})"  # noqa: S608


_JOBS = _Table(
    "jobs",
    {
        "id": "uuid",
        "tenant_id": "text",
        "state": "text",
        "model": "text",
        "lane": "text",
        "priority": "smallint",
        "max_attempts": "smallint",
        "batch_id": "uuid",
        "line": "bigint",
    },
)

_METERED_JOBS = _Table("jobs", _JOBS.columns | {"key_id": "uuid", "reserved_tokens": "integer"})

_PAYLOADS = _Table(
    "payloads",
    {
        "job_id": "uuid",
        "tenant_id": "text",
        "custom_id": "text",
        "endpoint": "text",
        "request": "json",
        "metadata": "json",
        "policy": "json",
        "digest": "bytea",
    },
)

_REJECTIONS = _Table(
    "rejections",
    {"batch_id": "uuid", "line": "bigint", "tenant_id": "text", "custom_id": "text", "error": "json"},
)

_SET_DEADLINES = text("""
UPDATE jobs SET deadline_at = now() + make_interval(secs => d.seconds)
FROM unnest(CAST(:ids AS uuid[]), CAST(:seconds AS double precision[])) AS d (id, seconds) WHERE jobs.id = d.id
""")

_OPEN = text("""
INSERT INTO batches (id, tenant_id, state, source) VALUES (:id, :tenant, 'filling', CAST(:source AS jsonb))
ON CONFLICT (id) DO NOTHING
""")

# A batch that is opened again is read on from its offset; the reader says when the end is reached.
_RESUME = text("UPDATE batches SET state = 'filling' WHERE id = :id AND tenant_id = :tenant AND finished_at IS NULL")

_GET = text("""
SELECT id, tenant_id, state, source, input_offset, input_lines, created_at, finished_at FROM batches
WHERE id = :id AND tenant_id = :tenant
""")

_KNOWN = text("""
SELECT custom_id FROM payloads WHERE job_id = ANY(:jobs) AND tenant_id = :tenant
UNION ALL SELECT custom_id FROM rejections
WHERE batch_id = :id AND tenant_id = :tenant AND custom_id = ANY(:custom_ids)
""")

_ADVANCE = text("""
UPDATE batches SET input_offset = :end, input_lines = :last_line
WHERE id = :id AND tenant_id = :tenant AND input_offset = :start AND finished_at IS NULL
RETURNING id
""")

_SET_STATE = text("""
UPDATE batches
SET state = CAST(:state AS text),
    finished_at = CASE WHEN :state IN ('finished', 'cancelled') THEN now() END
WHERE id = :id AND tenant_id = :tenant AND state = ANY(CAST(:allowed AS text[]))
""")

_PROGRESS = text("""
SELECT state, count(*) AS rows FROM jobs WHERE batch_id = :id AND tenant_id = :tenant GROUP BY state
UNION ALL SELECT 'rejected', count(*) FROM rejections WHERE batch_id = :id AND tenant_id = :tenant
""")

_MODELS = text("""
SELECT DISTINCT model FROM jobs WHERE batch_id = :id AND tenant_id = :tenant AND finished_at IS NULL ORDER BY model
""")

_SUMMARY = text("""
SELECT count(*) FILTER (WHERE j.state = 'succeeded') AS succeeded,
       coalesce(sum(l.prompt_tokens), 0)::bigint AS prompt_tokens,
       coalesce(sum(l.cached_tokens), 0)::bigint AS cached_tokens,
       coalesce(sum(l.completion_tokens), 0)::bigint AS completion_tokens,
       coalesce(sum(l.busy_seconds), 0)::double precision AS busy_seconds,
       coalesce(sum(l.token_dollars), 0)::double precision AS token_dollars,
       coalesce(sum(l.machine_dollars), 0)::double precision AS machine_dollars,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM j.finished_at - j.started_at)::double precision)
           FILTER (WHERE j.state = 'succeeded') AS latency_p50_seconds,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM j.finished_at - j.started_at)::double precision)
           FILTER (WHERE j.state = 'succeeded') AS latency_p95_seconds,
       min(j.started_at) AS first_started_at, max(j.finished_at) AS last_finished_at
FROM jobs j LEFT JOIN ledger l ON l.job_id = j.id
WHERE j.batch_id = :id AND j.tenant_id = :tenant
""")

_SAMPLES = text("""
WITH first AS MATERIALIZED (
    SELECT id, line FROM jobs WHERE batch_id = :id AND tenant_id = :tenant AND state = 'succeeded'
    ORDER BY line LIMIT :limit
)
SELECT p.request, r.choices
FROM first f JOIN payloads p ON p.job_id = f.id JOIN results r ON r.job_id = f.id ORDER BY f.line
""")

_UNFINISHED = text("""
SELECT 1 FROM jobs
WHERE batch_id = :id AND tenant_id = :tenant AND line > :after AND line <= :last AND finished_at IS NULL LIMIT 1
""")

# What a line of the output is made of.
_OUTPUTS = text("""
SELECT j.id, j.line, j.state, j.model, j.created_at, j.finished_at, p.custom_id, p.endpoint, p.metadata,
       r.choices, r.usage, r.error, r.served_by
FROM jobs j JOIN payloads p ON p.job_id = j.id JOIN results r ON r.job_id = j.id
WHERE j.batch_id = :id AND j.tenant_id = :tenant AND j.line > :after AND j.line <= :last ORDER BY j.line
""")

_REJECTED = text("""
SELECT line, custom_id, error FROM rejections
WHERE batch_id = :id AND tenant_id = :tenant AND line > :after ORDER BY line LIMIT :limit
""")
