"""Retention in SQL: what has ended long ago is deleted, and with it what was asked and answered. The bill stays.

A job goes with its payload, its result and its attempts. The lines of a batch go with their batch, not before its
output was handed over. Whatever has not ended stays. What Postgres itself keeps on disk of deleted rows goes at its
next VACUUM, and as its write-ahead log is recycled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, TextClause, text

from jobs.database import Database

_ROWS = 1_000  # in one transaction
_FIRST = UUID(int=0)
_DAY_SECONDS = 86_400.0
EVERY_TENANT = "*"


@dataclass(frozen=True, slots=True)
class Purged:
    """What is gone, in rows."""

    jobs: int = 0
    batches: int = 0
    conversations: int = 0

    def __add__(self, other: Purged) -> Purged:
        return Purged(self.jobs + other.jobs, self.batches + other.batches, self.conversations + other.conversations)


class Retention:
    """Deletes what has ended. May be called at any time, by several at once, and again after any failure."""

    def __init__(self, database: Database, forget: Callable[[Sequence[UUID]], object] = lambda _: None) -> None:
        """`forget` is told which jobs are gone, for what is kept of them elsewhere (`Streams.forget`)."""
        self.database = database
        self._forget = forget

    def purge(self, older_than_seconds: float, tenant_id: str | None = None, but: Collection[str] = ()) -> Purged:
        """What ended at least so long ago, of one tenant, or of all `but` some."""
        fields: dict[str, Any] = {"tenant": tenant_id, "but": list(but), "limit": _ROWS}
        fields["until"] = self.database.row(_UNTIL, {"seconds": older_than_seconds}).until
        jobs = self._in_steps(_PURGE_JOBS, fields, self._forget)
        batches = self._in_steps(_PURGE_BATCHES, fields)
        self._in_steps(_PURGE_API_BATCHES, fields)
        self._in_steps(_PURGE_FILES, fields)
        self.database.rows(_PURGE_ITEMS, fields)
        return Purged(jobs, batches, self._purge_conversations(fields))

    def keep_for(self, days: Mapping[str, float], only: str | None = None) -> Purged:
        """As `[retention_days]` says: by tenant, `*` for every other one. `only` one tenant's, if one is named."""
        if only is not None:
            kept = days.get(only, days.get(EVERY_TENANT))
            return Purged() if kept is None else self.purge(kept * _DAY_SECONDS, only)
        named = days.keys() - {EVERY_TENANT}
        purged = sum((self.purge(days[tenant] * _DAY_SECONDS, tenant) for tenant in named), Purged())
        if EVERY_TENANT in days:
            purged += self.purge(days[EVERY_TENANT] * _DAY_SECONDS, but=named)
        return purged

    def _in_steps(
        self,
        statement: TextClause,
        fields: dict[str, Any],
        then: Callable[[Sequence[UUID]], object] = lambda _: None,
    ) -> int:
        """Some rows at a time, walking the primary key: no long transaction, and no row is looked at twice."""
        count, after = 0, _FIRST
        while rows := self.database.rows(statement, fields | {"after": after}):
            count += len(rows)
            then([row.id for row in rows])
            after = max(row.id for row in rows)
        return count

    def _purge_conversations(self, fields: dict[str, Any]) -> int:
        count = 0
        while gone := self.database.run(lambda connection: _purge_conversations(connection, fields)):
            count += gone
        return count


def _purge_conversations(connection: Connection, fields: dict[str, Any]) -> int:
    # Locked first, as by a new turn; a statement of its own then sees the turn of whoever held the lock before.
    found = connection.execute(_LOCK_EMPTY_CONVERSATIONS, fields).all()
    if not found:
        return 0
    names = {"tenants": [row.tenant_id for row in found], "ids": [row.id for row in found]}
    return connection.execute(_PURGE_CONVERSATIONS, names).rowcount


_UNTIL = text("SELECT now() - make_interval(secs => :seconds) AS until")

_OF_TENANT = "(CAST(:tenant AS text) IS NULL OR {0}.tenant_id = :tenant) AND NOT {0}.tenant_id = ANY(:but)"

_PURGE_JOBS = text(f"""
DELETE FROM jobs WHERE id IN (
    SELECT j.id FROM jobs j
    WHERE j.id > :after AND j.finished_at <= :until AND {_OF_TENANT.format("j")}
      AND (j.batch_id IS NULL OR EXISTS (SELECT 1 FROM batches b WHERE b.id = j.batch_id AND b.finished_at <= :until))
    ORDER BY j.id LIMIT :limit
)
RETURNING id
""")  # noqa: S608 - composed of constants

# Their lines that did not become jobs go with them.
_PURGE_BATCHES = text(f"""
DELETE FROM batches WHERE id IN (
    SELECT b.id FROM batches b
    WHERE b.id > :after AND b.finished_at <= :until AND {_OF_TENANT.format("b")}
      AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.batch_id = b.id)
    ORDER BY b.id LIMIT :limit
)
RETURNING id
""")  # noqa: S608

_OPEN = "state IN ('cancelling', 'finalizing', 'in_progress', 'validating')"

_PURGE_API_BATCHES = text(f"""
DELETE FROM api_batches WHERE id IN (
    SELECT b.id FROM api_batches b
    WHERE b.id > :after AND b.created_at <= :until AND NOT b.{_OPEN} AND {_OF_TENANT.format("b")}
    ORDER BY b.id LIMIT :limit
)
RETURNING id
""")  # noqa: S608

_PURGE_FILES = text(f"""
DELETE FROM files WHERE id IN (
    SELECT f.id FROM files f
    WHERE f.id > :after AND f.created_at <= :until AND {_OF_TENANT.format("f")}
      AND NOT EXISTS (SELECT 1 FROM api_batches b WHERE b.input_file_id = f.id AND b.{_OPEN})
    ORDER BY f.id LIMIT :limit
)
RETURNING id
""")  # noqa: S608

# What was put in by hand; the turns are jobs.
_PURGE_ITEMS = text(f"""
DELETE FROM conversation_items i WHERE i.created_at <= :until AND {_OF_TENANT.format("i")}
""")  # noqa: S608

_LOCK_EMPTY_CONVERSATIONS = text(f"""
SELECT c.tenant_id, c.id FROM conversations c
WHERE c.created_at <= :until AND {_OF_TENANT.format("c")}
  AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.tenant_id = c.tenant_id AND j.conversation = c.id)
  AND NOT EXISTS (SELECT 1 FROM conversation_items i WHERE i.tenant_id = c.tenant_id AND i.conversation = c.id)
ORDER BY c.tenant_id, c.id LIMIT :limit FOR UPDATE OF c SKIP LOCKED
""")  # noqa: S608

_PURGE_CONVERSATIONS = text("""
DELETE FROM conversations c USING unnest(CAST(:tenants AS text[]), CAST(:ids AS text[])) AS e (tenant_id, id)
WHERE c.tenant_id = e.tenant_id AND c.id = e.id
  AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.tenant_id = c.tenant_id AND j.conversation = c.id)
""")
