"""The contract in the hands of a test: requests, a worker without an engine, and the tables as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID, uuid4

from psycopg.rows import dict_row

from jobs.database import Database
from jobs.ids import new_id
from jobs.leases import Leases, Load, Renewal
from jobs.schema import Choice, JobError, JobRequest, Timings, Usage
from jobs.states import AttemptOutcome, State
from jobs.store import Claim, Settled, Settlement, Store
from kit.databases import connect

LEASE_SECONDS = 10.0
MODEL = "echo"
WAITING_FOR_A_LOCK = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""
# In this order: what refers to a row goes before it, and the rest goes with it.
_TABLES = ("jobs", "batches", "workers", "ledger", "conversations", "api_keys", "webhook_secrets")


def request_of(**fields: Any) -> JobRequest:
    """A good request, but for the fields given."""
    return JobRequest.parse({"model": MODEL, "prompt": "hello"} | fields)


def turn_of(conversation: str, text: str = "hello", **fields: Any) -> JobRequest:
    """A good turn of that conversation."""
    messages = [{"role": "user", "content": text}]
    return JobRequest.parse({"model": MODEL, "messages": messages, "conversation": conversation} | fields)


def accept(store: Store, request: JobRequest | None = None, *, max_attempts: int = 3, tenant: str = "local") -> UUID:
    """A new job; its id."""
    return store.accept(new_id(), request or request_of(), max_attempts, tenant).id


def settlement(claim: Claim, outcome: str = "succeeded", *, busy_seconds: float = 0.0, **fields: Any) -> Settlement:
    """The end of one attempt: as given, else one that says its own token as the answer."""
    ok = outcome == "succeeded"
    defaults: dict[str, Any] = {
        "choices": (Choice(index=0, text=str(claim.token), finish_reason="stop"),) if ok else (),
        "error": JobError(code="engine_error", message="it broke") if outcome in {"failed", "retried"} else None,
        "usage": Usage(prompt_tokens=3, completion_tokens=2) if ok else Usage(),
        "timings": Timings(busy_seconds=busy_seconds),
        "metered": claim.metered,
        "awaited": claim.awaited,
    }
    return Settlement(claim.id, claim.token, AttemptOutcome(outcome), **(defaults | fields))


@dataclass(frozen=True)
class Worker:
    """One registered incarnation, which claims and settles by the contract alone."""

    database: Database
    model: str = MODEL
    id: UUID = field(default_factory=uuid4)

    @classmethod
    def hire(cls, database: Database, model: str = MODEL) -> Self:
        """A live one."""
        worker = cls(database, model)
        worker.leases.register(worker.id, model=model, host="here", pid=1, slots=4, info='{"engine": "none"}')
        return worker

    @property
    def store(self) -> Store:
        return Store(self.database)

    @property
    def leases(self) -> Leases:
        return Leases(self.database, LEASE_SECONDS)

    def try_claim(self, job_id: UUID) -> Claim | None:
        return self.store.claim(job_id, self.id, uuid4())

    def claim(self, job_id: UUID) -> Claim:
        """The job, which is there to be had."""
        claim = self.try_claim(job_id)
        assert claim is not None, f"job {job_id} could not be claimed"
        return claim

    def claim_bulk(self, rows: int) -> list[Claim]:
        return self.store.claim_bulk(self.model, self.id, [uuid4() for _ in range(rows)])

    def settle(self, claim: Claim, outcome: str = "succeeded", **fields: Any) -> Settled:
        return self.store.settle([settlement(claim, outcome, **fields)])

    def run(self, job_id: UUID, outcome: str = "succeeded", **fields: Any) -> Claim:
        """Claim it and settle it."""
        claim = self.claim(job_id)
        assert job_id in self.settle(claim, outcome, **fields).done
        return claim

    def renew(self, held: Sequence[UUID] = ()) -> Renewal:
        return self.leases.renew(self.id, Load(running=len(held), ready=True, busy_seconds=0.0), held)


class Tables:
    """The rows as they are, read and altered past the code under test."""

    def __init__(self, url: str) -> None:
        self._connection = connect(url)

    def close(self) -> None:
        self._connection.close()

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        with self._connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode(), values).fetchall()

    def value(self, query: str, *values: Any) -> Any:
        [row] = self.rows(query, *values)
        return next(iter(row.values()))

    def execute(self, statement: str, *values: Any) -> int:
        """Rows that it changed."""
        return self._connection.execute(statement.encode(), values).rowcount

    def empty(self) -> None:
        """No row of any test before."""
        for table in _TABLES:
            self.execute(f"DELETE FROM {table}")

    def job(self, job_id: UUID) -> dict[str, Any]:
        [row] = self.rows("SELECT * FROM jobs WHERE id = %s", job_id)
        return row

    def state(self, job_id: UUID) -> State:
        return State(self.job(job_id)["state"])

    def ledger(self, job_id: UUID) -> dict[str, Any]:
        """The one row of its bill."""
        [row] = self.rows("SELECT * FROM ledger WHERE job_id = %s", job_id)
        return row

    def attempts(self, job_id: UUID) -> list[dict[str, Any]]:
        """Oldest first."""
        return self.rows("SELECT * FROM attempts WHERE job_id = %s ORDER BY started_at", job_id)

    def outcomes(self, job_id: UUID) -> list[str | None]:
        return [attempt["outcome"] for attempt in self.attempts(job_id)]

    def count(self, table: str) -> int:
        return int(self.value(f"SELECT count(*) FROM {table}"))

    def move_back(self, job_id: UUID, column: str, seconds: float) -> None:
        """As if that had happened so much earlier."""
        moved = f"UPDATE jobs SET {column} = {column} - make_interval(secs => %s) WHERE id = %s"
        assert self.execute(moved, seconds, job_id) == 1

    def end_lease(self, worker_id: UUID) -> None:
        """As if the worker had not been heard of for long."""
        ended = "UPDATE workers SET lease_until = now() - interval '1 s' WHERE id = %s"
        assert self.execute(ended, worker_id) == 1
