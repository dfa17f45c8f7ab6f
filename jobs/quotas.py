"""Quotas in SQL: tokens of a key within a minute, reserved before a job is accepted and settled when it ends.

Lines of a batch are reserved as they are taken in, as many as there is room for; the rest waits for the next minute.

A key's minute begins with its first request after the minute before was over. One UPDATE checks, counts and begins a
new minute; Postgres makes those that come at once take turns. What a job did not use is given back by the statement
that ends it (`jobs.store`), if the minute still lasts. Nothing can leak: with the minute, every reservation is over.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.database import Database
from jobs.errors import QuotaExceeded
from jobs.keys import ApiKey

MINUTE_SECONDS = 60


class Quotas:
    """Reservations of the keys of one tenant, by the database's clock."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def reserve(self, key: ApiKey, tokens: int) -> None:
        """Count the tokens that a job may take at most. Raises QuotaExceeded, and counts nothing then."""
        fields = {"key": key.id, "tenant": key.tenant_id, "tokens": tokens, "minute": MINUTE_SECONDS}
        # What a crash of Postgres undoes here is a reservation of the same minute: no reason to wait for the disk.
        if not self.database.rows(_RESERVE, fields, relaxed=True):
            raise self._exceeded(key, tokens)

    def limit(self, key_id: UUID, tenant_id: str) -> int | None:
        """The tokens that this key has a minute; None: it has no limit any more."""
        row = self.database.row(_LIMIT, {"key": key_id, "tenant": tenant_id})
        return None if row is None else int(row.tokens_per_minute)

    def reserve_first(self, key_id: UUID, tenant_id: str, amounts: Sequence[int]) -> int:
        """Reserve the first of these amounts, as many as there is room for; how many that are."""
        fields = {"key": key_id, "tenant": tenant_id, "minute": MINUTE_SECONDS}

        def work(connection: Connection) -> int:
            left = connection.execute(_LOCK_LEFT, fields).scalar_one()
            sums = list(accumulate(amounts))
            count = bisect_right(sums, left)
            if count:
                connection.execute(_RESERVE, fields | {"tokens": sums[count - 1]})
            return count

        return self.database.run(work, relaxed=True)

    def give_back(self, key: ApiKey, tokens: int) -> None:
        """There is no job after all."""
        fields = {"key": key.id, "tenant": key.tenant_id, "tokens": tokens}
        self.database.rows(_GIVE_BACK, fields, relaxed=True)

    def _exceeded(self, key: ApiKey, tokens: int) -> QuotaExceeded:
        fields = {"key": key.id, "tenant": key.tenant_id, "minute": MINUTE_SECONDS}
        row = self.database.row(_LEFT, fields)
        seconds = MINUTE_SECONDS if row is None else min(max(math.ceil(row.seconds), 1), MINUTE_SECONDS)
        left = 0 if row is None else row.tokens
        return QuotaExceeded(
            f"the request may take {tokens:,} tokens, and of the {key.quota_tokens_per_minute:,} that this key has a "
            f"minute {left:,} are left",
            seconds,
        )


_LASTS = "minute_began_at > now() - make_interval(secs => :minute)"

_RESERVE = text(f"""
UPDATE quotas
SET used_tokens = CASE WHEN {_LASTS} THEN used_tokens ELSE 0 END + :tokens,
    minute_began_at = CASE WHEN {_LASTS} THEN minute_began_at ELSE now() END
WHERE key_id = :key AND tenant_id = :tenant
  AND CASE WHEN {_LASTS} THEN used_tokens ELSE 0 END + :tokens <= tokens_per_minute
RETURNING key_id
""")  # noqa: S608 - composed of constants

_LIMIT = text("SELECT tokens_per_minute FROM quotas WHERE key_id = :key AND tenant_id = :tenant")

_LOCK_LEFT = text(f"""
SELECT tokens_per_minute - CASE WHEN {_LASTS} THEN used_tokens ELSE 0 END
FROM quotas WHERE key_id = :key AND tenant_id = :tenant FOR UPDATE
""")  # noqa: S608

_GIVE_BACK = text("""
UPDATE quotas SET used_tokens = greatest(used_tokens - :tokens, 0) WHERE key_id = :key AND tenant_id = :tenant
""")

_LEFT = text("""
SELECT greatest(tokens_per_minute - used_tokens, 0) AS tokens,
       extract(epoch FROM minute_began_at + make_interval(secs => :minute) - now())::double precision AS seconds
FROM quotas WHERE key_id = :key AND tenant_id = :tenant
""")
