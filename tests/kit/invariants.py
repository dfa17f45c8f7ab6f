"""The promises, checked from outside: over SQL, and against the engines' own fsynced log of what they computed.

    with Witness(system) as witness:
        witness.saw(system.producer.submit(...))
        ...                                 # break things
        witness.check()                     # waits for every end, then raises if a promise was broken

Numbered as in docs/guarantees.md. What needs a clock, recovery and readiness, is asserted where it is measured.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import psutil
import psycopg

from jobs.schema import Job
from kit.contract import Tables
from kit.systems import PATIENCE_SECONDS, System
from kit.waiting import wait_until

_LOOK_SECONDS = 0.2

# Each gives the rows that break a promise, as (job or batch, what).
_BROKEN = {
    "I1 ends exactly once": """
        SELECT id, 'is still ' || state FROM jobs WHERE finished_at IS NULL
        UNION ALL
        SELECT j.id, 'ended as ' || j.state || ', by its attempts as ' || string_agg(a.outcome, ', ')
        FROM jobs j JOIN attempts a ON a.job_id = j.id
        WHERE a.outcome IN ('succeeded', 'failed', 'cancelled', 'expired')
        GROUP BY j.id HAVING count(*) > 1 OR min(a.outcome) <> j.state
    """,
    "I2 one result": """
        SELECT id, 'has no result' FROM jobs j
        WHERE finished_at IS NOT NULL AND NOT EXISTS (SELECT 1 FROM results r WHERE r.job_id = j.id)
        UNION ALL
        SELECT id, 'has a result and has not ended' FROM jobs j
        WHERE finished_at IS NULL AND EXISTS (SELECT 1 FROM results r WHERE r.job_id = j.id)
    """,
    "I3 billed once": """
        SELECT id, 'has no bill' FROM jobs j
        WHERE finished_at IS NOT NULL AND NOT EXISTS (SELECT 1 FROM ledger l WHERE l.job_id = j.id)
        UNION ALL
        SELECT l.job_id, 'is billed for ' || l.state || ' and is ' || coalesce(j.state, 'unknown')
        FROM ledger l LEFT JOIN jobs j ON j.id = l.job_id WHERE j.state IS DISTINCT FROM l.state
        UNION ALL
        SELECT l.job_id, 'is billed for other machine time than its attempts took'
        FROM ledger l JOIN attempts a ON a.job_id = l.job_id
        GROUP BY l.job_id, l.busy_seconds HAVING abs(sum(a.busy_seconds) - l.busy_seconds) > 1e-6
        UNION ALL
        SELECT l.job_id, 'is billed for tokens that its result does not have'
        FROM ledger l JOIN results r ON r.job_id = l.job_id
        WHERE l.completion_tokens NOT IN (0, (r.usage ->> 'completion_tokens')::integer)
    """,
    "I5 one attempt at a time": """
        SELECT a.job_id, 'has attempts that overlap' FROM attempts a JOIN attempts b
          ON a.job_id = b.job_id AND a.token < b.token
        WHERE a.started_at < coalesce(b.ended_at, 'infinity') AND b.started_at < coalesce(a.ended_at, 'infinity')
        UNION ALL
        SELECT job_id, 'has an attempt that was never closed' FROM attempts WHERE ended_at IS NULL
        UNION ALL
        SELECT j.id, 'counts ' || j.attempts || ' attempts and was charged ' || count(a.token)
        FROM jobs j LEFT JOIN attempts a ON a.job_id = j.id AND a.outcome IS DISTINCT FROM 'released'
        GROUP BY j.id HAVING count(a.token) <> j.attempts
    """,
}
_OPEN = "SELECT count(*) FROM jobs WHERE finished_at IS NULL"
_RESULTS = "SELECT r.job_id, md5(CAST(r AS text)) AS digest FROM results r"
_JOBS = "SELECT id FROM jobs"
_TOKENS = "SELECT token FROM attempts"


class BrokenPromise(AssertionError):
    """What was promised and was not so."""


class Witness:
    """Reads every result as soon as it is there, and knows what was accepted. A context manager.

    `claims_forgotten`: Postgres crashes in this test, and may forget claims, which do not wait for its disk.
    """

    def __init__(self, system: System, *, claims_forgotten: bool = False) -> None:
        self._claims_forgotten = claims_forgotten
        self.first_read: dict[UUID, str] = {}  # digest of each result when it was first seen
        self._changed: set[UUID] = set()
        self._earlier: set[UUID] = set()  # tokens of what was computed before: a crash may have forgotten their claims
        self._accepted: set[UUID] = set()
        self._system = system
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="witness")

    def __enter__(self) -> Self:
        self._earlier = set(self._executed())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def saw(self, *jobs: Job) -> None:
        """These were accepted: their ids reached a client."""
        self._accepted.update(job.id for job in jobs)

    def check(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until every job has ended. Raises BrokenPromise."""
        with suppress(TimeoutError):  # what has not ended then is a violation among others
            wait_until(self._all_ended, patience_seconds, "every job has ended")
        violations = self.violations()
        if violations:
            raise BrokenPromise("\n".join(violations[:20]))

    def violations(self) -> list[str]:
        """Everything that is not as promised, now that all should have ended."""
        tables = self._system.tables
        broken = broken_promises(tables)
        lost = self._accepted - {row[0] for row in _rows(tables, _JOBS)}
        broken += [f"I1 ends exactly once: {job_id} was accepted and is lost" for job_id in lost]
        self._look(tables)
        broken += [f"I2 one result: that of {job_id} changed after it was read" for job_id in self._changed]
        return broken + self._wrong_executions(tables)

    def _wrong_executions(self, tables: Tables) -> list[str]:
        """Nothing is computed but under a claim, and once for each."""
        executed = Counter(token for token in self._executed() if token not in self._earlier)
        known = {row[0] for row in _rows(tables, _TOKENS)}
        unknown = set() if self._claims_forgotten else executed.keys() - known
        twice = [token for token, times in executed.items() if times > 1]
        broken = [f"{token} was computed and never claimed" for token in unknown]
        broken += [f"{token} was computed twice" for token in twice]
        return [f"I5 one attempt at a time: {what}" for what in broken]

    def _executed(self) -> list[UUID]:
        return [one.token for worker in self._system.workers for one in worker.executions()]

    def _all_ended(self) -> bool:
        with suppress(psycopg.Error):
            return bool(self._system.tables.value(_OPEN) == 0)
        return False

    def _read(self) -> None:
        tables: Tables | None = None
        while not self._stop.wait(_LOOK_SECONDS):
            try:
                tables = tables or Tables(str(self._system.settings.database_url))
                self._look(tables)
            except psycopg.Error:  # it is away, or has dropped us
                tables = None
        if tables is not None:
            tables.close()

    def _look(self, tables: Tables) -> None:
        for job_id, digest in _rows(tables, _RESULTS):
            if self.first_read.setdefault(job_id, digest) != digest:
                self._changed.add(job_id)


def broken_promises(tables: Tables) -> list[str]:
    """What the tables alone show."""
    return [f"{name}: {row[0]} {row[1]}" for name, sql in _BROKEN.items() for row in _rows(tables, sql)]


def check_output(output: Path, errors: Path, custom_ids: Iterable[str]) -> None:
    """I4: the two files of a bulk run hold every `custom_id` exactly once, in whole lines. Raises BrokenPromise."""
    found = Counter(line["custom_id"] for path in (output, errors) if path.exists() for line in _lines(path))
    wanted = Counter(custom_ids)
    if found != wanted:
        raise BrokenPromise(f"I4 each line once: too many {found - wanted}, missing {wanted - found}")


def check_memory(members: Callable[[], list[psutil.Process]], load: Callable[[], object]) -> None:
    """I9: after the third identical load they hold at most a tenth more than after the second. Raises BrokenPromise."""
    held: list[int] = []
    for _ in range(3):
        load()
        held.append(sum(process.memory_info().rss for process in members()))
    if held[2] > 1.1 * held[1]:
        raise BrokenPromise(f"I9 no leak: bytes held after each load: {held}")


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except ValueError as error:
        raise BrokenPromise(f"I4 each line once: half a line in {path}: {error}") from None


def _rows(tables: Tables, sql: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in tables.rows(sql)]
