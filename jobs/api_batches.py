"""Batches of the API in SQL: their states, the stamps of each, and who sees to them.

             a              b                c               d
  (create) ────> validating ──> in_progress ──> finalizing ──> completed | expired
                     │ e             │ f
                     ├──> failed     │
                     └───────────────┴──> cancelling ──g──> cancelled

a  `create`      a gateway
b  `started`     its runner: the file as a whole is good
c  `finalizing`  its runner: every request has ended
d  `ended`       its runner: the output files are there. Expired: requests were left when its time was over
e  `failed`      its runner: a fault of the file as a whole, or it cannot be run
f  `cancel`      a gateway
g  `ended`       its runner: every request has ended, what succeeded is in the output file

A runner is a thread of any gateway, with a lease. Who lost it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import TextClause, text

from jobs.database import Database
from jobs.errors import Fenced, IdempotencyConflict, NotFound
from jobs.states import ApiBatchState

LIFE_SECONDS = 86_400
LEASE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a batch's input file as a whole."""

    code: str
    message: str
    line: int | None = None  # from 1
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the requests, and the tokens of all of them."""

    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ApiBatch:
    """A batch as its owner sees it."""

    id: UUID
    tenant_id: str
    state: ApiBatchState
    endpoint: str
    input_file_id: UUID
    output_file_id: UUID | None
    error_file_id: UUID | None
    output_seconds: int | None
    metadata: dict[str, str] | None
    errors: list[dict[str, Any]] | None
    counts: Counts
    models: list[str] | None  # those that it may use; None: all
    key_id: UUID | None  # whose quota its requests are of; None: nobody's
    created_at: datetime
    in_progress_at: datetime | None
    finalizing_at: datetime | None
    completed_at: datetime | None
    failed_at: datetime | None
    expired_at: datetime | None
    cancelling_at: datetime | None
    cancelled_at: datetime | None
    expires_at: datetime
    seconds_left: float  # until it expires; negative afterwards


class ApiBatches:
    """Every transition of and look at a batch of the API."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self,
        batch_id: UUID,
        tenant_id: str,
        *,
        endpoint: str,
        input_file_id: UUID,
        metadata: dict[str, str],
        output_seconds: int | None = None,
        idempotency_key: str | None = None,
        models: Sequence[str] | None = None,
        webhook: str | None = None,
        key_id: UUID | None = None,
    ) -> ApiBatch:
        """A new batch, which a runner will find. The same key with the same request is the same batch.

        Raises IdempotencyConflict.
        """
        fields = {
            "id": batch_id,
            "tenant": tenant_id,
            "endpoint": endpoint,
            "input": input_file_id,
            "metadata": orjson.dumps(metadata).decode() if metadata else None,
            "output_seconds": output_seconds,
            "key": idempotency_key,
            "models": None if models is None else [*models],
            "webhook": webhook,
            "key_id": key_id,
            "life": LIFE_SECONDS,
        }
        if self.database.row(_CREATE, fields) is None:
            return self._created_before(fields)
        return self.get(batch_id, tenant_id)

    def _created_before(self, fields: dict[str, Any]) -> ApiBatch:
        row = self.database.row(_FIND_SAME, fields)
        same = row is not None and (row.endpoint, row.input_file_id) == (fields["endpoint"], fields["input"])
        if row is None or not same:
            raise IdempotencyConflict("idempotency_key: was used before with another request")
        return self.get(row.id, fields["tenant"])

    def get(self, batch_id: UUID, tenant_id: str) -> ApiBatch:
        """The batch. Raises NotFound."""
        row = self.database.row(_GET, {"id": batch_id, "tenant": tenant_id})
        if row is None:
            raise NotFound(f"no batch {batch_id}")
        return _batch_of(row)

    def list(self, tenant_id: str, *, after: UUID | None, limit: int) -> list[ApiBatch]:
        """Batches, the newest first, behind `after`."""
        return [_batch_of(row) for row in self.database.rows(_LIST, {"tenant": tenant_id, "after": after, "n": limit})]

    def cancel(self, batch_id: UUID, tenant_id: str) -> ApiBatch:
        """Have it cancelled; one that has ended stays as it is. Raises NotFound."""
        self.database.rows(_CANCEL, {"id": batch_id, "tenant": tenant_id})
        return self.get(batch_id, tenant_id)

    # -- its runner ---------------------------------------------------------------------------------------------

    def take(self, runner: UUID) -> tuple[UUID, str] | None:
        """See to a batch that nobody sees to, whoever it belongs to, the oldest first: its id and tenant.

        None if there is none.
        """
        row = self.database.row(_TAKE, {"runner": runner, "lease": LEASE_SECONDS})
        return None if row is None else (row.id, row.tenant_id)

    def renew(self, batch_id: UUID, runner: UUID) -> ApiBatch:
        """Go on seeing to it. Raises Fenced."""
        return self._move(_RENEW, batch_id, runner, lease=LEASE_SECONDS)

    def started(self, batch_id: UUID, runner: UUID, total: int) -> ApiBatch:
        """So many requests run from now on. Raises Fenced."""
        return self._move(_STARTED, batch_id, runner, counts=_json(Counts(total)))

    def failed(self, batch_id: UUID, runner: UUID, faults: Sequence[Fault]) -> ApiBatch:
        """Nothing of it runs. Raises Fenced."""
        errors = [
            {"code": fault.code, "message": fault.message, "line": fault.line, "param": fault.param} for fault in faults
        ]
        return self._move(_FAILED, batch_id, runner, errors=orjson.dumps(errors).decode())

    def finalizing(self, batch_id: UUID, runner: UUID) -> ApiBatch:
        """Every request has ended. One that is being cancelled stays so. Raises Fenced."""
        return self._move(_FINALIZING, batch_id, runner)

    def ended(
        self,
        batch_id: UUID,
        runner: UUID,
        *,
        expired: bool,
        counts: Counts,
        output_file_id: UUID | None,
        error_file_id: UUID | None,
    ) -> ApiBatch:
        """Its files are there: completed, expired, or cancelled if that was asked for. Raises Fenced."""
        fields = {"expired": expired, "counts": _json(counts), "output": output_file_id, "error": error_file_id}
        return self._move(_ENDED, batch_id, runner, **fields)

    def rest(self, batch_id: UUID, runner: UUID, seconds: float) -> None:
        """Nothing is to be done for so long; then any runner may go on."""
        self.database.rows(_REST, {"id": batch_id, "runner": runner, "seconds": seconds})

    def _move(self, statement: TextClause, batch_id: UUID, runner: UUID, **fields: Any) -> ApiBatch:
        row = self.database.row(statement, {"id": batch_id, "runner": runner} | fields)
        if row is None:
            raise Fenced(f"batch {batch_id} is somebody else's")
        return _batch_of(row)


def _batch_of(row: Any) -> ApiBatch:
    return ApiBatch(**(row._asdict() | {"state": ApiBatchState(row.state), "counts": Counts(**(row.counts or {}))}))


def _json(counts: Counts) -> str:
    return orjson.dumps(asdict(counts)).decode()


_COLUMNS = """
id, tenant_id, state, endpoint, input_file_id, output_file_id, error_file_id, output_seconds, metadata, errors, counts,
models, key_id, created_at, in_progress_at, finalizing_at, completed_at, failed_at, expired_at, cancelling_at,
cancelled_at, expires_at, extract(epoch FROM expires_at - now())::double precision AS seconds_left
"""

_OPEN = "state IN ('cancelling', 'finalizing', 'in_progress', 'validating')"
_MINE = f"id = :id AND runner = :runner AND {_OPEN}"
_LET_GO = "runner = NULL, runner_until = NULL"

_CREATE = text("""
INSERT INTO api_batches (id, tenant_id, state, endpoint, input_file_id, metadata, output_seconds, idempotency_key,
                         models, webhook, key_id, expires_at)
VALUES (:id, :tenant, 'validating', :endpoint, :input, CAST(:metadata AS json), CAST(:output_seconds AS integer),
        CAST(:key AS text), CAST(:models AS text[]), CAST(:webhook AS text),
        CAST(:key_id AS uuid), now() + make_interval(secs => :life))
ON CONFLICT DO NOTHING RETURNING id
""")

_FIND_SAME = text("""
SELECT id, endpoint, input_file_id FROM api_batches
WHERE tenant_id = :tenant AND (id = :id OR idempotency_key = CAST(:key AS text))
""")

_GET = text(f"SELECT {_COLUMNS} FROM api_batches WHERE id = :id AND tenant_id = :tenant")  # noqa: S608 - of constants

_LIST = text(f"""
SELECT {_COLUMNS} FROM api_batches
WHERE tenant_id = :tenant AND (CAST(:after AS uuid) IS NULL OR id < :after) ORDER BY id DESC LIMIT :n
""")  # noqa: S608

_CANCEL = text("""
UPDATE api_batches SET state = 'cancelling', cancelling_at = now()
WHERE id = :id AND tenant_id = :tenant AND state IN ('validating', 'in_progress')
""")

# For all tenants at once: see migration 0003.
_TAKE = text("SELECT id, tenant_id FROM headrace_take_batch(:runner, :lease)")

_RENEW = text(f"""
UPDATE api_batches SET runner_until = now() + make_interval(secs => :lease) WHERE {_MINE} RETURNING {_COLUMNS}
""")  # noqa: S608

_STARTED = text(f"""
UPDATE api_batches
SET state = CASE state WHEN 'validating' THEN 'in_progress' ELSE state END,
    in_progress_at = CASE state WHEN 'validating' THEN now() ELSE in_progress_at END,
    counts = CAST(:counts AS json)
WHERE {_MINE} RETURNING {_COLUMNS}
""")  # noqa: S608

# From `moved`, which has ended: whom to tell.
_TELL = f"""
told AS (
    INSERT INTO webhook_deliveries (id, tenant_id, batch_id, url)
    SELECT gen_random_uuid(), tenant_id, id, webhook FROM moved WHERE webhook IS NOT NULL
)
SELECT {_COLUMNS} FROM moved
"""  # noqa: S608

_FAILED = text(f"""
WITH moved AS (
    UPDATE api_batches SET state = 'failed', failed_at = now(), errors = CAST(:errors AS json), {_LET_GO}
    WHERE {_MINE} RETURNING *
), {_TELL}
""")  # noqa: S608

_FINALIZING = text(f"""
UPDATE api_batches
SET state = CASE state WHEN 'in_progress' THEN 'finalizing' ELSE state END,
    finalizing_at = CASE state WHEN 'in_progress' THEN now() ELSE finalizing_at END
WHERE {_MINE} RETURNING {_COLUMNS}
""")  # noqa: S608

_ENDED = text(f"""
WITH moved AS (
    UPDATE api_batches
    SET state = CASE WHEN state = 'cancelling' THEN 'cancelled' WHEN :expired THEN 'expired' ELSE 'completed' END,
        cancelled_at = CASE WHEN state = 'cancelling' THEN now() END,
        expired_at = CASE WHEN state <> 'cancelling' AND :expired THEN now() END,
        completed_at = CASE WHEN state <> 'cancelling' AND NOT :expired THEN now() END,
        counts = CAST(:counts AS json), output_file_id = CAST(:output AS uuid), error_file_id = CAST(:error AS uuid),
        {_LET_GO}
    WHERE {_MINE} RETURNING *
), {_TELL}
""")  # noqa: S608

_REST = text(f"""
UPDATE api_batches SET runner_until = now() + make_interval(secs => :seconds) WHERE {_MINE}
""")  # noqa: S608
