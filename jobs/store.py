"""The life of a job in SQL: one function per transition, guarded by state and token, timed by the database's clock.

A transition that comes too late affects no row. Nobody outside `jobs/` writes SQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, NoReturn
from uuid import UUID

import orjson
from sqlalchemy import Connection, Row, TextClause, text

from jobs.conversations import Conversations
from jobs.database import Database, Execute
from jobs.errors import IdempotencyConflict, NotFound
from jobs.schema import Call, Choice, Job, JobError, JobRequest, Timings, Usage
from jobs.states import AttemptOutcome, Lane, State
from jobs.tables import LOCAL_TENANT

# A message that was never sent is sent after this long; one whose queue is empty was lost.
REPUBLISH_SECONDS = 2.0
# A message is taken for lost when one that was sent this much later, in the same lane and priority, has started.
OVERTAKEN_SECONDS = 10.0
SWEEP_ROWS = 1000
# Why a job was given back that may have been the end of its engine. It is found again when it is claimed.
SUSPECT = "its engine died while others ran too; it runs alone next"


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a submit came to."""

    id: UUID
    state: State
    job: Job | None  # as it was committed; None: the same request was accepted before

    @property
    def created(self) -> bool:
        """Whether it is new."""
        return self.job is not None


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a job may take of a key's quota; when it ends, what it did not take goes back."""

    key_id: UUID
    tokens: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued interactive job that wants a message."""

    id: UUID
    model: str
    priority: int
    tenant_id: str = LOCAL_TENANT


@dataclass(frozen=True, slots=True)
class Follower:
    """A blocked job, and the one that it goes on from, which has ended or is not there any more."""

    id: UUID
    tenant_id: str
    after_id: UUID


@dataclass(frozen=True, slots=True)
class Claim:
    """One running job in a worker's hands, under the token without which it cannot be ended."""

    id: UUID
    token: UUID
    tenant_id: str
    model: str
    lane: Lane
    priority: int
    attempt: int  # from 1
    max_attempts: int
    queue_seconds: float  # from the moment it could start
    seconds_left: float | None  # to its deadline
    conversation: str | None
    turn: int | None
    metered: bool  # whether it has reserved tokens of a key's quota
    request: JobRequest
    suspect: bool = False  # an engine died under it and others, and one of them is to blame

    @property
    def awaited(self) -> bool:
        """Whether somebody is to be told of its end."""
        return self.request.webhook is not None

    def log_context(self) -> dict[str, str]:
        """What every log line about this job carries."""
        return {"job": str(self.id), "model": self.model, "attempt": str(self.attempt)}


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a worker wants one attempt to end: in a final state, or (`retry_after_seconds`) back in the queue.

    `charged` is False for a job that is given back untouched: the attempt does not count.
    """

    id: UUID
    token: UUID
    outcome: AttemptOutcome
    choices: tuple[Choice, ...] = ()
    error: JobError | None = None
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    served_by: str | None = None
    token_dollars: Decimal = Decimal(0)
    machine_dollars: Decimal = Decimal(0)
    retry_after_seconds: float | None = None
    metered: bool = True  # False: nothing of a quota is to be given back, and nothing is looked for
    awaited: bool = True  # False: nobody is to be told, and nobody is looked for

    @property
    def requeues(self) -> bool:
        """Whether the job runs again."""
        return self.outcome in {AttemptOutcome.RETRIED, AttemptOutcome.RELEASED}

    @property
    def charged(self) -> bool:
        """Whether the attempt counts against `max_attempts`."""
        return self.outcome is not AttemptOutcome.RELEASED


@dataclass(frozen=True, slots=True)
class Settled:
    """What a transaction of settlements came to."""

    done: frozenset[UUID] = frozenset()  # ended or requeued as asked, now or by an earlier try of the same commit
    released: tuple[Waiting, ...] = ()  # next turns that may run now


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep found and mended."""

    lost: int = 0  # ended because their worker died and no attempt was left, or they were to be cancelled
    requeued: int = 0  # queued again because their worker died
    expired: int = 0
    abandoned: int = 0  # came back to the queue although their batch was cancelled
    to_publish: tuple[Waiting, ...] = ()
    ended: tuple[UUID, ...] = field(default=(), repr=False)

    def log_context(self) -> dict[str, int]:
        """One line of counts."""
        return {
            "lost": self.lost,
            "requeued": self.requeued,
            "expired": self.expired,
            "abandoned": self.abandoned,
            "published_again": len(self.to_publish),
        }


class Store:
    """Every transition and every look at a job."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # -- in -----------------------------------------------------------------------------------------------------

    def accept(
        self,
        job_id: UUID,
        request: JobRequest,
        max_attempts: int,
        tenant_id: str = LOCAL_TENANT,
        reservation: Reservation | None = None,
        *,
        endpoint: str | None = None,
        call: Call | None = None,
        after: UUID | None = None,
    ) -> Accepted:
        """Insert the job; from here on it cannot be lost. Repeating it with the same id or idempotency key is safe.

        `endpoint` and `call`: the route it came by, and how, if the answer needs to know. `after`: it is blocked until
        that job has ended and `release` says what was said up to there. Raises IdempotencyConflict if id or key stand
        for another request.
        """
        fields = _accept_fields(job_id, request, tenant_id) | {
            "max_attempts": request.max_attempts or max_attempts,
            "key_id": reservation and reservation.key_id,
            "reserved_tokens": reservation and reservation.tokens,
            "after": after,
            "endpoint": endpoint,
            "call": call and call.model_dump_json(exclude_defaults=True),
        }
        created = self._accept_turn(fields) if request.conversation else self.database.row(_ACCEPT, fields)
        if created is None:
            return self._accepted_before(fields) or _refuse_conflict(fields)
        return Accepted(job_id, State(created.state), _accepted_job(fields, request, call, created))

    def _accept_turn(self, fields: dict[str, Any]) -> Row[Any] | None:
        try:
            return self.database.run(lambda c: _accept_turn(c, fields))
        except _AcceptedBefore:
            return None

    def accepted_before(self, job_id: UUID, request: JobRequest, tenant_id: str = LOCAL_TENANT) -> Accepted | None:
        """The same request, by its id or idempotency key; None: there is none."""
        return self._accepted_before(_accept_fields(job_id, request, tenant_id))

    def _accepted_before(self, fields: dict[str, Any]) -> Accepted | None:
        row = self.database.row(_FIND_SAME, fields)
        if row is None or row.digest != fields["digest"]:
            return None
        return Accepted(row.id, State(row.state), None)

    def mark_published(self, ids: Sequence[UUID]) -> None:
        """Note that a message went out for these jobs."""
        self.database.rows(_MARK_PUBLISHED, {"ids": list(ids)}, relaxed=True)

    # -- running ------------------------------------------------------------------------------------------------

    def claim(self, job_id: UUID, worker_id: UUID, token: UUID) -> Claim | None:
        """Take one queued job that is due. None: somebody else has it, or it has ended, or this worker is not live."""
        return next(iter(self._claim(_CLAIM, worker_id, [token], id=job_id)), None)

    def claim_bulk(self, model: str, worker_id: UUID, tokens: Sequence[UUID]) -> list[Claim]:
        """Take up to `len(tokens)` rows of the route's open batches, tenants in turn, by priority and line."""
        return self._claim(_CLAIM_BULK, worker_id, tokens, model=model, limit=len(tokens))

    def _claim(self, statement: TextClause, worker_id: UUID, tokens: Sequence[UUID], **which: Any) -> list[Claim]:
        fields = which | {"worker": worker_id, "tokens": list(tokens), "suspect": SUSPECT}
        again = False

        def work(execute: Execute) -> list[Any]:
            # An earlier try may have been committed although its reply was lost: read it back by its tokens.
            nonlocal again
            rows = execute(_HELD, fields) if again else []
            again = True
            return rows or execute(statement, fields)

        return [_claim_of(row) for row in self.database.single(work, relaxed=True)]

    def settle(self, settlements: Sequence[Settlement]) -> Settled:
        """End or requeue many attempts: each whole or not at all, with its result, ledger row and next turn's release.

        A job whose cancel was asked for is cancelled instead of requeued. What is not held under its token any more
        is left alone and missing from `done`. May be repeated.
        """
        # Nearly all of them are ends that release no turn: one statement is their transaction, one round trip.
        ending = [s for s in settlements if not s.requeues]
        statement = _END_ALONE_IN_FULL if any(s.metered or s.awaited for s in ending) else _END_ALONE
        done = {row.id for row in self.database.rows(statement, _document(ending))} if ending else set()
        rest = [s for s in settlements if s.id not in done]
        if not rest:
            return Settled(frozenset(done))
        settled = self.database.run(lambda c: _settle(c, rest))
        return replace(settled, done=settled.done | done)

    def history(self, tenant_id: str, conversation: str, before_turn: int) -> list[dict[str, str]]:
        """The messages before a turn, oldest first: of turns that succeeded, and what was put in by hand."""
        items = Conversations(self.database).items(tenant_id, conversation, before_turn=before_turn)
        return [item.message for item in items]

    def ended(self, job_ids: Sequence[UUID]) -> set[UUID]:
        """Which of these jobs have ended, whoever they belong to."""
        return {row.id for row in self.database.rows(_WHICH_ENDED, {"ids": list(job_ids)})}

    def waiting(self) -> dict[str, int]:
        """How many interactive jobs wait for each model, whoever they belong to."""
        return {row.model: row.jobs for row in self.database.rows(_COUNT_WAITING)}

    def followers(self, limit: int) -> list[Follower]:
        """Blocked jobs that may go on from the one before, whoever they belong to."""
        return [Follower(**row._asdict()) for row in self.database.rows(_FOLLOWERS, {"limit": limit})]

    def release(self, job_id: UUID, tenant_id: str, request: JobRequest, policy: dict[str, str]) -> Waiting | None:
        """Queue one of them with its whole request. None: it waits no more."""
        payload = request.payload()
        fields = {
            "id": job_id,
            "tenant": tenant_id,
            "request": payload,
            "digest": request.digest(payload),
            "policy": orjson.dumps(policy).decode() if policy else None,
        }
        row = self.database.row(_RELEASE, fields)
        return None if row is None else _waiting_of(row)

    def strand(self, job_id: UUID, tenant_id: str, error: JobError) -> bool:
        """End one of them, which has nothing to go on from. False: it waits no more."""
        fields = {"id": job_id, "tenant": tenant_id, "error": error.model_dump_json()}
        return self.database.row(_STRAND, fields) is not None

    def forget(self, job_id: UUID, tenant_id: str) -> bool:
        """Hide the job from the API for good. False: there is none, or it is hidden already."""
        return self.database.row(_FORGET, {"id": job_id, "tenant": tenant_id}) is not None

    # -- cancel, sweep ------------------------------------------------------------------------------------------

    def cancel(self, job_id: UUID, tenant_id: str = LOCAL_TENANT) -> tuple[State, tuple[Waiting, ...]]:
        """End a job that waits; ask the worker of a running one to stop it. Returns its state and released turns.

        A final job is left as it is. Raises NotFound.
        """
        return self.database.run(lambda c: _cancel(c, job_id, tenant_id))

    def sweep(self, empty_queues: Sequence[str]) -> Swept | None:
        """Mend what no living worker will: rows of dead workers, overdue rows, lost messages. One sweeper at a time.

        `empty_queues` names the models whose interactive queue in Redis is known to be empty. None: another sweeps.
        """
        return self.database.run(lambda c: _sweep(c, empty_queues))

    def models_waiting(self) -> list[str]:
        """Models with queued interactive jobs."""
        return [row.model for row in self.database.rows(_MODELS_WAITING)]

    def exists(self, job_id: UUID) -> bool:
        """Whether there is such a job, whoever it belongs to."""
        return self.database.row(_TENANT_OF, {"id": job_id}) is not None

    def tenant_of(self, job_id: UUID) -> str:
        """Whose job it is, for tools of the operator's. Raises NotFound."""
        row = self.database.row(_TENANT_OF, {"id": job_id})
        if row is None:
            raise NotFound(f"no job {job_id}")
        return str(row.tenant_id)

    # -- looks --------------------------------------------------------------------------------------------------

    def get(self, job_id: UUID, tenant_id: str = LOCAL_TENANT) -> Job:
        """The job. Raises NotFound."""
        fields = {"id": job_id, "tenant": tenant_id}
        row = self.database.row(_GET, fields)
        if row is None:
            raise NotFound(f"no job {job_id}")
        return _job_of(row._asdict())

    def get_call(self, job_id: UUID, tenant_id: str, *, forgotten: bool = False) -> tuple[Job, JobRequest]:
        """A job that the API still knows, or has `forgotten`, and what was asked of it. Raises NotFound."""
        row = self.database.row(_GET_CALL, {"id": job_id, "tenant": tenant_id, "forgotten": forgotten})
        if row is None:
            raise NotFound(f"no job {job_id}")
        fields = row._asdict()
        request = JobRequest.model_validate(fields.pop("request"))
        return _job_of(fields), request

    def list(
        self,
        tenant_id: str = LOCAL_TENANT,
        *,
        states: Iterable[State] = (),
        model: str | None = None,
        batch_id: UUID | None = None,
        conversation: str | None = None,
        before: UUID | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Jobs by id, newest first; `before` is the last id of the page before."""
        fields = {
            "tenant": tenant_id,
            "states": [str(state) for state in states] or None,
            "model": model,
            "batch": batch_id,
            "conversation": conversation,
            "before": before,
            "limit": limit,
        }
        return [_job_of(row._asdict()) for row in self.database.rows(_LIST, fields)]


# == how ========================================================================================================


class _AcceptedBefore(Exception):
    """Rolls a turn's number back: the job was there already."""


def _accept_fields(job_id: UUID, request: JobRequest, tenant_id: str) -> dict[str, Any]:
    payload = request.payload()
    return {
        "id": job_id,
        "tenant": tenant_id,
        "model": request.model,
        "priority": request.priority,
        "deadline_seconds": request.deadline_seconds,
        "key": request.idempotency_key,
        "conversation": request.conversation,
        "turn": None,
        "request": payload,
        "metadata": request.metadata_payload(),
        "webhook": request.webhook,
        "policy": request.findings_payload(),
        "digest": request.digest(payload),
    }


def _refuse_conflict(fields: dict[str, Any]) -> NoReturn:
    name = "idempotency_key" if fields["key"] else "id"
    raise IdempotencyConflict(f"{name}: was used before with another request")


def _accept_turn(connection: Connection, fields: dict[str, Any]) -> Row[Any]:
    # The conversation's row is the lock that orders a new turn against the end of the one before it.
    if connection.execute(_FIND_SAME, fields).first() is not None:
        raise _AcceptedBefore
    turn = connection.execute(_NEXT_TURN, fields).scalar_one()
    # A statement of its own, after the lock: it must see what whoever held the lock before has committed.
    created = connection.execute(_ACCEPT, fields | {"turn": turn}).one_or_none()
    if created is None:  # the same key came in at the same time
        raise _AcceptedBefore
    return created


def _accepted_job(fields: dict[str, Any], request: JobRequest, call: Call | None, created: Any) -> Job:
    """Built, not read back: what the database has added is in `created`."""
    return Job(
        id=fields["id"],
        tenant_id=fields["tenant"],
        state=State(created.state),
        model=request.model,
        lane=Lane.INTERACTIVE,
        priority=request.priority,
        attempts=0,
        max_attempts=fields["max_attempts"],
        created_at=created.created_at,
        conversation=request.conversation,
        turn=created.turn,
        metadata=request.metadata,
        endpoint=fields["endpoint"],
        call=call,
        policy=request.findings,
    )


def _settle(connection: Connection, settlements: Sequence[Settlement]) -> Settled:
    requeue = [s for s in settlements if s.requeues]
    done = _requeue(connection, requeue) if requeue else set()
    ending = [s for s in settlements if not s.requeues]
    # What could not be requeued was to be cancelled, or is not ours any more; the token tells.
    ending += [_cancelled(s) for s in requeue if s.id not in done]
    ended = connection.execute(_END_HELD, _document(ending)).all() if ending else []
    done |= {row.id for row in ended}
    doubtful = [s.token for s in settlements if s.id not in done]
    if doubtful:
        done |= set(connection.execute(_CLOSED_BEFORE, {"tokens": doubtful}).scalars())
    return Settled(frozenset(done), _release_turns(connection, ended))


def _requeue(connection: Connection, settlements: Sequence[Settlement]) -> set[UUID]:
    return set(connection.execute(_REQUEUE, _document(settlements)).scalars())


def _cancelled(settlement: Settlement) -> Settlement:
    """What it made is kept; that it would have run again is not the owner's error."""
    return replace(settlement, outcome=AttemptOutcome.CANCELLED, error=None, retry_after_seconds=None)


def _document(settlements: Sequence[Settlement]) -> dict[str, str]:
    """All of them as one JSON text: Postgres takes it apart faster than Python builds sixteen arrays."""
    return {"settlements": orjson.dumps([_record(settlement) for settlement in settlements]).decode()}


def _record(settlement: Settlement) -> dict[str, Any]:
    # `vars`: a model's own dump takes ten times as long (1 µs), and there are thousands of rows a second.
    usage = vars(settlement.usage)
    return {
        "id": settlement.id,
        "token": settlement.token,
        "outcome": settlement.outcome,
        # JSON within JSON: json_to_recordset would refuse a \\u0000 that it has to look into.
        "choices_text": orjson.dumps([choice.stored() for choice in settlement.choices]).decode(),
        "error_text": settlement.error and settlement.error.model_dump_json(),
        "usage": usage,
        "timings": vars(settlement.timings),
        "served_by": settlement.served_by,
        "busy_seconds": settlement.timings.busy_seconds,
        "token_dollars": str(settlement.token_dollars),
        "machine_dollars": str(settlement.machine_dollars),
        "delay": settlement.retry_after_seconds or 0.0,
        "charged": settlement.charged,
        **usage,
    }


def _cancel(connection: Connection, job_id: UUID, tenant_id: str) -> tuple[State, tuple[Waiting, ...]]:
    fields = {"id": job_id, "tenant": tenant_id}
    # The end of the turn before locks the conversation, then the turn it releases: the same order here, or the two
    # would wait for each other.
    connection.execute(_LOCK_CONVERSATION_OF_BLOCKED, fields)
    row = connection.execute(_LOCK, fields).one_or_none()
    if row is None:
        raise NotFound(f"no job {job_id}")
    state = State(row.state)
    if state is State.RUNNING:
        connection.execute(_ASK_TO_STOP, fields)
    if state in {State.QUEUED, State.BLOCKED}:
        ended = connection.execute(_END_WAITING, fields).all()
        return State.CANCELLED, _release_turns(connection, ended)
    return state, ()


def _sweep(connection: Connection, empty_queues: Sequence[str]) -> Swept | None:
    if not connection.execute(_ONE_SWEEPER).scalar_one():
        return None
    connection.execute(_BURY)
    lost = connection.execute(_END_LOST, {"limit": SWEEP_ROWS}).all()
    requeued = connection.execute(_REQUEUE_LOST, {"limit": SWEEP_ROWS}).all()
    expired = connection.execute(_END_OVERDUE, {"limit": SWEEP_ROWS}).all()
    abandoned = connection.execute(_END_ABANDONED, {"limit": SWEEP_ROWS}).all()
    connection.execute(_FINISH_BATCHES)
    released = _release_turns(connection, [*lost, *expired])
    waiting = connection.execute(
        _TO_PUBLISH,
        {
            "empty": list(empty_queues),
            "republish": REPUBLISH_SECONDS,
            "overtaken": OVERTAKEN_SECONDS,
            "limit": SWEEP_ROWS,
        },
    ).all()
    return Swept(
        lost=len(lost),
        requeued=len(requeued),
        expired=len(expired),
        abandoned=len(abandoned),
        to_publish=(*released, *(_waiting_of(row) for row in waiting)),
        ended=tuple(row.id for row in [*lost, *expired]),
    )


def _release_turns(connection: Connection, ended: Sequence[Row[Any]]) -> tuple[Waiting, ...]:
    turns = sorted({(row.tenant_id, row.conversation) for row in ended if row.conversation is not None})
    if not turns:
        return ()
    fields = {"tenants": [t for t, _ in turns], "conversations": [c for _, c in turns]}
    # A statement of its own, after the lock: it must see what whoever held the lock before has committed.
    connection.execute(_LOCK_CONVERSATIONS, fields)
    return tuple(_waiting_of(row) for row in connection.execute(_RELEASE_TURNS, fields))


def _waiting_of(row: Any) -> Waiting:
    return Waiting(row.id, row.model, row.priority, row.tenant_id)


def _claim_of(row: Any) -> Claim:
    return Claim(
        id=row.id,
        token=row.token,
        tenant_id=row.tenant_id,
        model=row.model,
        lane=Lane(row.lane),
        priority=row.priority,
        attempt=row.attempts,
        max_attempts=row.max_attempts,
        queue_seconds=row.queue_seconds,
        seconds_left=row.seconds_left,
        conversation=row.conversation,
        turn=row.turn,
        metered=row.metered,
        request=JobRequest.model_validate_json(row.request),
        suspect=row.suspect,
    )


def _job_of(fields: dict[str, Any]) -> Job:
    """A Job from a row of `_SELECT_JOB`."""
    cost = {name: fields.pop(name) for name in ("busy_seconds", "token_dollars", "machine_dollars")}
    fields["metadata"] = fields["metadata"] or {}
    fields["policy"] = fields["policy"] or {}
    fields["choices"] = fields["choices"] or ()
    if cost["token_dollars"] is not None:
        fields["cost"] = cost
    return Job.model_validate(fields)


# == SQL ========================================================================================================

_ACCEPT = text("""
WITH created AS (
    INSERT INTO jobs (id, tenant_id, state, model, lane, priority, max_attempts, deadline_at, idempotency_key,
                      conversation, turn, after_id, key_id, reserved_tokens)
    VALUES (:id, :tenant,
            CASE WHEN CAST(:after AS uuid) IS NOT NULL OR EXISTS (
                SELECT 1 FROM jobs
                WHERE tenant_id = :tenant AND conversation = CAST(:conversation AS text) AND finished_at IS NULL
            ) THEN 'blocked' ELSE 'queued' END,
            :model, 'interactive', :priority, :max_attempts,
            now() + make_interval(secs => CAST(:deadline_seconds AS double precision)), :key, :conversation,
            CAST(:turn AS integer), CAST(:after AS uuid), CAST(:key_id AS uuid), CAST(:reserved_tokens AS integer))
    ON CONFLICT DO NOTHING
    RETURNING id, state, turn, created_at
), payload AS (
    INSERT INTO payloads (job_id, tenant_id, endpoint, request, metadata, webhook, call, policy, digest)
    SELECT id, :tenant, :endpoint, CAST(:request AS json), CAST(:metadata AS json), :webhook, CAST(:call AS json),
           CAST(:policy AS json), :digest
    FROM created
)
SELECT state, turn, created_at FROM created
""")

_FIND_SAME = text("""
SELECT j.id, j.state, p.digest FROM jobs j JOIN payloads p ON p.job_id = j.id
WHERE j.tenant_id = :tenant AND (j.id = :id OR j.idempotency_key = CAST(:key AS text))
ORDER BY j.id = :id DESC
""")

_NEXT_TURN = text("""
INSERT INTO conversations AS c (tenant_id, id, turns) VALUES (:tenant, :conversation, 1)
ON CONFLICT (tenant_id, id) DO UPDATE SET turns = c.turns + 1
RETURNING turns
""")

_MARK_PUBLISHED = text("""
UPDATE jobs SET published_at = now() WHERE id = ANY(:ids) AND published_at IS NULL AND state = 'queued'
""")

_CLAIMED_COLUMNS = """
    j.id, j.token, j.tenant_id, j.model, j.lane, j.priority, j.attempts, j.max_attempts, j.conversation, j.turn,
    j.key_id IS NOT NULL AS metered,
    extract(epoch FROM now() - j.run_after)::double precision AS queue_seconds,
    extract(epoch FROM j.deadline_at - now())::double precision AS seconds_left,
    EXISTS (SELECT 1 FROM attempts a WHERE a.job_id = j.id AND a.error = :suspect) AS suspect
"""

_TAKE = f"""
claimed AS (
    UPDATE jobs j
    SET state = 'running', token = p.token, worker_id = :worker, attempts = attempts + 1,
        started_at = coalesce(started_at, now())
    FROM picked p
    WHERE j.id = p.id AND j.state = 'queued'
      AND EXISTS (SELECT 1 FROM workers w WHERE w.id = :worker AND w.state = 'live' AND w.lease_until > now())
    RETURNING {_CLAIMED_COLUMNS}
), opened AS (
    INSERT INTO attempts (token, job_id, tenant_id, worker_id) SELECT token, id, tenant_id, :worker FROM claimed
)
SELECT claimed.*, payloads.request::text AS request FROM claimed JOIN payloads ON payloads.job_id = claimed.id
"""  # noqa: S608 - composed of constants

_DUE = "run_after <= now() AND (deadline_at IS NULL OR deadline_at > now())"

_CLAIM = text(f"""
WITH picked AS (
    SELECT id, (CAST(:tokens AS uuid[]))[1] AS token FROM jobs
    WHERE id = :id AND state = 'queued' AND {_DUE}
), {_TAKE}
""")  # noqa: S608

_CLAIM_BULK = text(f"""
WITH heads AS (
    -- the head of each open batch's backlog
    SELECT c.id, b.tenant_id, c.priority, c.line
    FROM batches b CROSS JOIN LATERAL (
        SELECT j.id, j.priority, j.line FROM jobs j
        WHERE j.batch_id = b.id AND j.model = :model AND j.state = 'queued' AND j.lane = 'bulk' AND {_DUE}
        ORDER BY j.priority, j.line LIMIT :limit
        FOR UPDATE SKIP LOCKED
    ) c
    WHERE b.state IN ('filling', 'running')
), ranked AS (
    SELECT id, row_number() OVER (PARTITION BY tenant_id ORDER BY priority, line) AS turn FROM heads
), picked AS (
    SELECT id, (CAST(:tokens AS uuid[]))[row_number() OVER (ORDER BY turn)] AS token
    FROM (SELECT id, turn FROM ranked ORDER BY turn LIMIT :limit) fair
), {_TAKE}
""")  # noqa: S608

_HELD = text(f"""
SELECT {_CLAIMED_COLUMNS}, payloads.request::text AS request FROM jobs j JOIN payloads ON payloads.job_id = j.id
WHERE j.worker_id = :worker AND j.state = 'running' AND j.token = ANY(:tokens)
""")  # noqa: S608

_INPUT = """
input AS (
    SELECT i.*, choices_text::json AS choices, error_text::json AS error
    FROM json_to_recordset(CAST(:settlements AS json)) AS i (
        id uuid, token uuid, outcome text, choices_text text, error_text text, usage json, timings json, served_by text,
        prompt_tokens integer, cached_tokens integer, completion_tokens integer, busy_seconds double precision,
        token_dollars numeric, machine_dollars numeric, delay double precision, charged boolean
    )
)
"""

_INPUT_HELD = """
    SELECT i.*, i.outcome AS attempt_outcome, j.cancel_requested_at
    FROM input i JOIN jobs j ON j.id = i.id AND j.token = i.token
"""

# Locked in one order, so that two transactions never wait for each other.
_SETTLEMENTS = f"{_INPUT}, held AS ({_INPUT_HELD} ORDER BY j.id FOR UPDATE OF j)"

# From `ended`: the result, the bill and the attempt's end.
_WRITE = """
, written AS (
    INSERT INTO results (job_id, tenant_id, choices, error, usage, timings, served_by)
    SELECT id, tenant_id, choices, error, usage, timings, served_by FROM ended
), billed AS (
    INSERT INTO ledger (job_id, tenant_id, batch_id, model, state, prompt_tokens, cached_tokens, completion_tokens,
                        busy_seconds, token_dollars, machine_dollars)
    SELECT e.id, e.tenant_id, e.batch_id, e.model, e.outcome, e.prompt_tokens, e.cached_tokens, e.completion_tokens,
           e.busy_seconds + earlier.busy_seconds, e.token_dollars, e.machine_dollars + earlier.machine_dollars
    FROM ended e CROSS JOIN LATERAL (
        SELECT coalesce(sum(a.busy_seconds), 0) AS busy_seconds, coalesce(sum(a.machine_dollars), 0) AS machine_dollars
        FROM attempts a WHERE a.job_id = e.id AND a.ended_at IS NOT NULL
    ) earlier
), closed AS (
    UPDATE attempts a
    SET ended_at = now(), outcome = e.attempt_outcome, error = e.error ->> 'message', busy_seconds = e.busy_seconds,
        machine_dollars = e.machine_dollars
    FROM ended e WHERE a.token = e.token AND a.ended_at IS NULL
)
"""

_ENDED = "SELECT id, tenant_id, conversation FROM ended"

# What goes back to a key's quota while its minute lasts. Keys are locked in one order, so that two transactions never
# wait for each other.
_GIVE_BACK = """
, metered AS (
    SELECT key_id, minute_began_at FROM quotas
    WHERE key_id IN (SELECT e.key_id FROM ended e) AND minute_began_at > now() - interval '60 s'
    ORDER BY key_id FOR UPDATE
), unused AS (
    SELECT m.key_id, sum(e.reserved_tokens - e.prompt_tokens - e.completion_tokens) AS tokens
    FROM ended e JOIN metered m ON m.key_id = e.key_id AND m.minute_began_at <= e.created_at GROUP BY m.key_id
), given_back AS (
    UPDATE quotas q SET used_tokens = greatest(q.used_tokens - u.tokens, 0) FROM unused u WHERE q.key_id = u.key_id
)
"""

# Whom to tell. Lines of a batch have nobody; their batch may.
_TELL = """
, told AS (
    INSERT INTO webhook_deliveries (id, tenant_id, job_id, url)
    SELECT gen_random_uuid(), e.tenant_id, e.id, p.webhook FROM ended e JOIN payloads p ON p.job_id = e.id
    WHERE e.batch_id IS NULL AND p.webhook IS NOT NULL
)
"""

_TAIL = f"{_WRITE} {_GIVE_BACK} {_TELL} {_ENDED}"

_END = """
ended AS (
    UPDATE jobs j SET state = h.outcome, finished_at = now(), token = NULL, worker_id = NULL
    FROM held h WHERE j.id = h.id
    RETURNING j.id, j.tenant_id, j.model, j.batch_id, j.conversation, j.created_at, j.key_id, j.reserved_tokens,
              h.token, h.outcome, h.attempt_outcome,
              h.choices, h.error, h.usage, h.timings, h.served_by, h.prompt_tokens, h.cached_tokens,
              h.completion_tokens, h.busy_seconds, h.token_dollars, h.machine_dollars
)
"""

_END_HELD = text(f"""
WITH {_SETTLEMENTS}, {_END} {_TAIL}
""")

# Those that are no turn of a conversation. What is left over takes the longer way.
_END_ALONE = text(f"""
WITH {_INPUT}, held AS (
    {_INPUT_HELD} WHERE j.conversation IS NULL ORDER BY j.id FOR UPDATE OF j
), {_END} {_WRITE} {_ENDED}
""")

# With what goes back to quotas, and whom to tell: measured, a tenth more time for one job, which is not for everybody
# to pay.
_END_ALONE_IN_FULL = text(f"""
WITH {_INPUT}, held AS (
    {_INPUT_HELD} WHERE j.conversation IS NULL ORDER BY j.id FOR UPDATE OF j
), {_END} {_TAIL}
""")

_REQUEUE = text(f"""
WITH {_SETTLEMENTS}, queued AS (
    UPDATE jobs j
    SET state = 'queued', token = NULL, worker_id = NULL, published_at = NULL,
        run_after = now() + make_interval(secs => h.delay), attempts = attempts - CASE WHEN h.charged THEN 0 ELSE 1 END
    FROM held h WHERE j.id = h.id AND h.cancel_requested_at IS NULL
    RETURNING j.id, h.token, h.outcome, h.error, h.busy_seconds, h.machine_dollars
), closed AS (
    UPDATE attempts a
    SET ended_at = now(), outcome = q.outcome, error = q.error ->> 'message', busy_seconds = q.busy_seconds,
        machine_dollars = q.machine_dollars
    FROM queued q WHERE a.token = q.token AND a.ended_at IS NULL
)
SELECT id FROM queued
""")  # noqa: S608

_CLOSED_BEFORE = text("""
SELECT job_id FROM attempts WHERE token = ANY(:tokens) AND ended_at IS NOT NULL AND outcome <> 'lost'
""")

_TENANT_OF = text("SELECT tenant_id FROM jobs WHERE id = :id")

_LOCK = text("SELECT state FROM jobs WHERE id = :id AND tenant_id = :tenant FOR UPDATE")

_LOCK_CONVERSATION_OF_BLOCKED = text("""
SELECT 1 FROM conversations c JOIN jobs j ON j.tenant_id = c.tenant_id AND j.conversation = c.id
WHERE j.id = :id AND j.tenant_id = :tenant AND j.state = 'blocked' FOR UPDATE OF c
""")

_ASK_TO_STOP = text("""
UPDATE jobs SET cancel_requested_at = coalesce(cancel_requested_at, now()) WHERE id = :id AND tenant_id = :tenant
""")

# A row that ends without a worker's word: nothing was made, nothing is charged.
_NOTHING_MADE = """
    '[]'::json AS choices,
    json_build_object('prompt_tokens', 0, 'cached_tokens', 0, 'completion_tokens', 0) AS usage,
    '{}'::json AS timings, NULL::text AS served_by, 0 AS prompt_tokens, 0 AS cached_tokens, 0 AS completion_tokens,
    0::double precision AS busy_seconds, 0::numeric AS token_dollars, 0::numeric AS machine_dollars
"""
_CANCELLED_BEFORE_IT_BEGAN = f"""
    NULL::uuid AS token, 'cancelled' AS outcome, NULL AS attempt_outcome, NULL::json AS error, {_NOTHING_MADE}
"""
_EXPIRED_BEFORE_IT_BEGAN = f"""
    NULL::uuid AS token, 'expired' AS outcome, NULL AS attempt_outcome,
    json_build_object('code', 'deadline_exceeded', 'message', 'its deadline passed before it could start') AS error,
    {_NOTHING_MADE}
"""

_END_WAITING = text(f"""
WITH held AS (
    SELECT id, {_CANCELLED_BEFORE_IT_BEGAN}
    FROM jobs WHERE id = :id AND tenant_id = :tenant AND state IN ('queued', 'blocked')
), {_END} {_TAIL}
""")  # noqa: S608

# For all tenants at once: see migration 0007.
_FOLLOWERS = text("SELECT id, tenant_id, after_id FROM headrace_followers(:limit)")

_FOLLOWS = "id = :id AND tenant_id = :tenant AND state = 'blocked' AND after_id IS NOT NULL"

_RELEASE = text(f"""
WITH released AS (
    UPDATE jobs SET state = 'queued', run_after = now() WHERE {_FOLLOWS} RETURNING id, model, priority, tenant_id
), completed AS (
    UPDATE payloads p SET request = CAST(:request AS json), digest = :digest, policy = CAST(:policy AS json)
    FROM released r WHERE p.job_id = r.id
)
SELECT id, model, priority, tenant_id FROM released
""")  # noqa: S608

_STRAND = text(f"""
WITH held AS (
    SELECT id, NULL::uuid AS token, 'failed' AS outcome, NULL AS attempt_outcome, CAST(:error AS json) AS error,
           {_NOTHING_MADE}
    FROM jobs WHERE {_FOLLOWS} FOR UPDATE
), {_END} {_TAIL}
""")  # noqa: S608

# The rows of a batch that wait, some at a time. What is locked is being claimed, and is left.
END_WAITING_ROWS = text(f"""
WITH held AS (
    SELECT id, {_CANCELLED_BEFORE_IT_BEGAN}
    FROM jobs WHERE batch_id = :id AND tenant_id = :tenant AND state = 'queued' AND lane = 'bulk'
    LIMIT :limit FOR UPDATE SKIP LOCKED
), {_END} {_TAIL}
""")  # noqa: S608

# The same, of a batch whose time is over. Sweepers do this too, but they live in workers, and there may be none.
EXPIRE_WAITING_ROWS = text(f"""
WITH held AS (
    SELECT id, {_EXPIRED_BEFORE_IT_BEGAN}
    FROM jobs WHERE batch_id = :id AND state = 'queued' AND lane = 'bulk' AND deadline_at <= now()
    LIMIT :limit FOR UPDATE SKIP LOCKED
), {_END} {_TAIL}
""")  # noqa: S608

STOP_RUNNING_ROWS = text("""
WITH running AS (
    SELECT id FROM jobs WHERE batch_id = :id AND tenant_id = :tenant AND state = 'running' ORDER BY id FOR UPDATE
)
UPDATE jobs j SET cancel_requested_at = coalesce(cancel_requested_at, now()) FROM running r WHERE j.id = r.id
""")

_ONE_SWEEPER = text("SELECT pg_try_advisory_xact_lock(hashtext('headrace.sweeper'))")

# One that is just being renewed, or hangs in doing so, must not hold up the sweep of the others.
_BURY = text("""
WITH late AS (
    SELECT id FROM workers WHERE state IN ('live', 'draining') AND lease_until < now() FOR UPDATE SKIP LOCKED
)
UPDATE workers w SET state = 'dead' FROM late WHERE w.id = late.id
""")

_OF_A_DEAD_WORKER = """
    j.state = 'running'
    AND NOT EXISTS (SELECT 1 FROM workers w WHERE w.id = j.worker_id AND w.state IN ('live', 'draining'))
"""

_END_LOST = text(f"""
WITH held AS (
    SELECT id, token, 'lost' AS attempt_outcome,
           CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled' ELSE 'failed' END AS outcome,
           CASE WHEN cancel_requested_at IS NULL THEN json_build_object(
               'code', 'worker_lost', 'message', format('its worker died, and attempt %s was the last', attempts)
           ) END AS error, {_NOTHING_MADE}
    FROM jobs j
    WHERE {_OF_A_DEAD_WORKER} AND (cancel_requested_at IS NOT NULL OR attempts >= max_attempts)
    ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
), {_END} {_TAIL}
""")  # noqa: S608

_REQUEUE_LOST = text(f"""
WITH held AS (
    SELECT id, token FROM jobs j
    WHERE {_OF_A_DEAD_WORKER} AND cancel_requested_at IS NULL AND attempts < max_attempts
    ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
), queued AS (
    UPDATE jobs j
    SET state = 'queued', token = NULL, worker_id = NULL, published_at = NULL, run_after = now()
    FROM held h WHERE j.id = h.id
    RETURNING j.id, h.token
), closed AS (
    UPDATE attempts a SET ended_at = now(), outcome = 'lost', error = 'its worker died'
    FROM queued q WHERE a.token = q.token AND a.ended_at IS NULL
)
SELECT id FROM queued
""")  # noqa: S608

_END_OVERDUE = text(f"""
WITH held AS (
    SELECT id, {_EXPIRED_BEFORE_IT_BEGAN}
    FROM jobs WHERE deadline_at <= now() AND finished_at IS NULL AND state IN ('queued', 'blocked')
    ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
), {_END} {_TAIL}
""")  # noqa: S608

# Claimed while their batch was being cancelled, and then queued again by a retry.
_END_ABANDONED = text(f"""
WITH held AS (
    SELECT j.id, {_CANCELLED_BEFORE_IT_BEGAN}
    FROM batches b JOIN jobs j ON j.batch_id = b.id AND j.state = 'queued' AND j.lane = 'bulk'
    WHERE b.state = 'cancelled' AND b.finished_at > now() - interval '1 day'
    LIMIT :limit FOR UPDATE OF j SKIP LOCKED
), {_END} {_TAIL}
""")  # noqa: S608

# A file's batch is finished when its output is handed over; one of `submit_many` when its last row has ended.
_FINISH_BATCHES = text("""
UPDATE batches b SET state = 'finished', finished_at = now()
WHERE b.state = 'running' AND b.source ->> 'kind' = 'submit_many'
  AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.batch_id = b.id AND j.state = 'queued' AND j.lane = 'bulk')
  AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.batch_id = b.id AND j.state = 'running')
""")

_TO_PUBLISH = text("""
WITH overtaken AS (
    -- A row that starts at once never learns when its message went out: not before it could start, so that will do.
    SELECT model, priority, max(coalesce(published_at, run_after)) AS published_at FROM jobs
    WHERE lane = 'interactive' AND started_at > now() - interval '60 s' AND run_after <= started_at
    GROUP BY model, priority
), due AS (
    SELECT j.id FROM jobs j LEFT JOIN overtaken o ON o.model = j.model AND o.priority = j.priority
    WHERE j.state = 'queued' AND j.lane = 'interactive' AND j.run_after <= now() AND (
        (j.published_at IS NULL AND (j.attempts > 0 OR j.run_after < now() - make_interval(secs => :republish)))
        OR (j.published_at < now() - make_interval(secs => :republish) AND j.model = ANY(CAST(:empty AS text[])))
        OR (j.published_at < now() - make_interval(secs => :overtaken)
            AND j.published_at < o.published_at - make_interval(secs => :overtaken))
    )
    ORDER BY j.priority, j.run_after LIMIT :limit
    FOR UPDATE OF j SKIP LOCKED
)
UPDATE jobs j SET published_at = now() FROM due WHERE j.id = due.id RETURNING j.id, j.model, j.priority, j.tenant_id
""")

_MODELS_WAITING = text("SELECT DISTINCT model FROM jobs WHERE state = 'queued' AND lane = 'interactive'")

_LOCK_CONVERSATIONS = text("""
SELECT 1 FROM conversations c
JOIN unnest(CAST(:tenants AS text[]), CAST(:conversations AS text[])) AS e (tenant_id, id)
  ON c.tenant_id = e.tenant_id AND c.id = e.id
ORDER BY c.tenant_id, c.id FOR UPDATE OF c
""")

_RELEASE_TURNS = text("""
UPDATE jobs j SET state = 'queued', run_after = now()
FROM unnest(CAST(:tenants AS text[]), CAST(:conversations AS text[])) AS e (tenant_id, conversation)
WHERE j.tenant_id = e.tenant_id AND j.conversation = e.conversation AND j.state = 'blocked' AND NOT EXISTS (
    SELECT 1 FROM jobs b
    WHERE b.tenant_id = j.tenant_id AND b.conversation = j.conversation AND b.turn < j.turn AND b.finished_at IS NULL
)
RETURNING j.id, j.model, j.priority, j.tenant_id
""")

# For all tenants at once: see migration 0003.
_WHICH_ENDED = text("SELECT headrace_ended(:ids) AS id")

_COUNT_WAITING = text("SELECT model, jobs FROM headrace_waiting()")

_FORGET = text("""
UPDATE payloads SET forgotten_at = now() WHERE job_id = :id AND tenant_id = :tenant AND forgotten_at IS NULL
RETURNING job_id
""")

_SELECT_JOB = """
SELECT j.id, j.tenant_id, j.state, j.model, j.lane, j.priority, j.attempts, j.max_attempts, j.created_at, j.started_at,
       j.finished_at, j.cancel_requested_at, j.worker_id, j.conversation, j.turn, j.batch_id, j.line, p.custom_id,
       p.endpoint, p.metadata, p.call, p.policy, r.choices, r.usage, r.timings, r.error, r.served_by,
       l.busy_seconds, l.token_dollars, l.machine_dollars
FROM jobs j
JOIN payloads p ON p.job_id = j.id
LEFT JOIN results r ON r.job_id = j.id
LEFT JOIN ledger l ON l.job_id = j.id
"""

_GET = text(f"{_SELECT_JOB} WHERE j.id = :id AND j.tenant_id = :tenant")

# Of the job, and what it was asked.
_GET_CALL = text(f"""
SELECT c.*, p.request
FROM ({_SELECT_JOB} WHERE j.id = :id AND j.tenant_id = :tenant AND (p.forgotten_at IS NULL OR :forgotten)) c
JOIN payloads p ON p.job_id = c.id
""")  # noqa: S608

_LIST = text(f"""{_SELECT_JOB}
WHERE j.tenant_id = :tenant
  AND (CAST(:states AS text[]) IS NULL OR j.state = ANY(CAST(:states AS text[])))
  AND (CAST(:model AS text) IS NULL OR j.model = :model)
  AND (CAST(:batch AS uuid) IS NULL OR j.batch_id = :batch)
  AND (CAST(:conversation AS text) IS NULL OR j.conversation = :conversation)
  AND (CAST(:before AS uuid) IS NULL OR j.id < :before)
ORDER BY j.id DESC LIMIT :limit
""")
