"""The tables. Hot and narrow: `jobs`. What is asked and answered lies apart: `payloads`, `results`.

CHECK constraints hold what the code promises, so that a mistake in the code is an error and not a wrong row.
"""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON, JSONB
from sqlalchemy.sql.schema import SchemaItem

from jobs.states import FINAL, ApiBatchState, AttemptOutcome, BatchState, Lane, Role, State, WorkerState

metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    },
)

LOCAL_TENANT = "local"
_FINAL = "('cancelled', 'expired', 'failed', 'succeeded')"
assert set(_FINAL.strip("()").replace("'", "").split(", ")) == FINAL


def _tenant() -> Column[str]:
    return Column("tenant_id", Text, nullable=False, server_default=LOCAL_TENANT)


def _now(name: str) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=text("now()"))


def _time(name: str) -> Column[object]:
    return Column(name, DateTime(timezone=True))


def _seconds(name: str) -> Column[float]:
    return Column(name, Double, nullable=False, server_default="0")


def _dollars(name: str) -> Column[object]:
    # 12 decimals: one token at 0.01 dollars per million tokens is 1e-8 dollars.
    return Column(name, Numeric(20, 12), nullable=False, server_default="0")


def _job_key() -> Column[object]:
    return Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


def _one_of(column: str, values: type[StrEnum]) -> SchemaItem:
    names = ", ".join(f"'{value}'" for value in sorted(values))
    return CheckConstraint(f"{column} IN ({names})", name=f"{column}_known")


def _roles() -> str:
    names = ", ".join(f"'{role}'::text" for role in sorted(Role))
    return f"ARRAY[{names}]"


jobs = Table(
    "jobs",
    metadata,
    Column("id", Uuid, primary_key=True),  # made by the client
    _tenant(),
    Column("state", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False),  # 0 goes first
    Column("attempts", SmallInteger, nullable=False, server_default="0"),  # claims that were charged to the job
    Column("max_attempts", SmallInteger, nullable=False),
    _now("created_at"),
    _now("run_after"),  # when it may start: acceptance, release of a turn, or the end of a retry's wait
    _time("published_at"),  # when its message last went out; null: not yet
    _time("started_at"),  # first claim
    _time("finished_at"),
    _time("deadline_at"),
    _time("cancel_requested_at"),
    Column("worker_id", Uuid),  # who holds it while running
    Column("token", Uuid),  # under which it is held; without it nothing can be finished
    Column("idempotency_key", Text),
    Column("conversation", Text),
    Column("turn", Integer),  # from 1
    Column("after_id", Uuid),  # the job that it goes on from, if that had not ended when it was accepted
    Column("batch_id", Uuid, ForeignKey("batches.id", ondelete="CASCADE")),
    Column("line", BigInteger),  # line number in the batch's input, from 1
    Column("key_id", Uuid),  # the API key that it came in with, if that has a quota
    Column("reserved_tokens", Integer),  # of that quota
    _one_of("state", State),
    _one_of("lane", Lane),
    CheckConstraint(f"(finished_at IS NOT NULL) = (state IN {_FINAL})", name="finished_when_final"),
    CheckConstraint(
        "(state = 'running') = (token IS NOT NULL) AND (token IS NULL) = (worker_id IS NULL)",
        name="held_when_running",
    ),
    CheckConstraint("state <> 'running' OR started_at IS NOT NULL", name="started_when_running"),
    CheckConstraint("attempts BETWEEN 0 AND max_attempts", name="attempts_bounded"),
    CheckConstraint("(lane = 'bulk') = (batch_id IS NOT NULL)", name="bulk_in_a_batch"),
    CheckConstraint("(batch_id IS NULL) = (line IS NULL)", name="line_in_a_batch"),
    CheckConstraint("(conversation IS NULL) = (turn IS NULL)", name="turn_in_a_conversation"),
    CheckConstraint("(key_id IS NULL) = (reserved_tokens IS NULL)", name="reserved_under_a_key"),
    CheckConstraint("state <> 'blocked' OR turn > 1 OR after_id IS NOT NULL", name="only_later_turns_block"),
    Index(
        "jobs_idempotency_key_key",
        "tenant_id",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    Index("jobs_turn_key", "tenant_id", "conversation", "turn", unique=True, postgresql_where=text("turn IS NOT NULL")),
    Index("jobs_batch_line_idx", "batch_id", "line", postgresql_where=text("batch_id IS NOT NULL")),
    Index(
        "jobs_backlog_idx",
        "batch_id",
        "model",
        "priority",
        "line",
        postgresql_where=text("state = 'queued' AND lane = 'bulk'"),
    ),
    Index(
        "jobs_waiting_idx",
        "model",
        "priority",
        "run_after",
        postgresql_where=text("state = 'queued' AND lane = 'interactive'"),
    ),
    Index("jobs_running_idx", "worker_id", postgresql_where=text("state = 'running'")),
    Index("jobs_after_idx", "after_id", postgresql_where=text("state = 'blocked' AND after_id IS NOT NULL")),
    Index("jobs_blocked_idx", "model", postgresql_where=text("state = 'blocked'")),
    Index(
        "jobs_deadline_idx",
        "deadline_at",
        postgresql_where=text("deadline_at IS NOT NULL AND finished_at IS NULL"),
    ),
    Index("jobs_started_idx", "model", "priority", "started_at", postgresql_where=text("lane = 'interactive'")),
    Index("jobs_listed_idx", "tenant_id", "id"),
)

payloads = Table(
    "payloads",
    metadata,
    _job_key(),
    _tenant(),
    Column("custom_id", Text),  # the caller's name of a batch's line
    Column("endpoint", Text),  # the route it was written for, which decides the form of its answer
    Column("request", JSON, nullable=False),  # json, not jsonb: the text is kept byte for byte
    Column("call", JSON),  # how it came over the API; null: not over the API, or in a batch
    Column("forgotten_at", DateTime(timezone=True)),  # when its owner deleted it from the API
    # As in the request, but apart: Postgres reads no field of a JSON text that holds a NUL character.
    Column("metadata", JSON),
    Column("webhook", Text),
    Column("policy", JSON),  # rules of the tenant's policy that took hold, and what each did
    Column("digest", LargeBinary, nullable=False),
)

results = Table(
    "results",
    metadata,
    _job_key(),
    _tenant(),
    Column("choices", JSON, nullable=False),
    Column("error", JSON),
    Column("usage", JSON, nullable=False),
    Column("timings", JSON, nullable=False),
    Column("served_by", Text),
    _now("created_at"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("token", Uuid, primary_key=True),
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    _tenant(),
    Column("worker_id", Uuid, nullable=False),
    _now("started_at"),
    _time("ended_at"),
    Column("outcome", Text),
    Column("error", Text),
    _seconds("busy_seconds"),
    _dollars("machine_dollars"),  # busy seconds at the rate of the worker that spent them
    _one_of("outcome", AttemptOutcome),
    CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name="closed_once"),
    Index("attempts_job_id_idx", "job_id"),
)

# No foreign key: the bill outlives what it was for.
ledger = Table(
    "ledger",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    _tenant(),
    Column("batch_id", Uuid),
    Column("model", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("prompt_tokens", Integer, nullable=False, server_default="0"),
    Column("cached_tokens", Integer, nullable=False, server_default="0"),
    Column("completion_tokens", Integer, nullable=False, server_default="0"),
    _seconds("busy_seconds"),
    _dollars("token_dollars"),
    _dollars("machine_dollars"),
    _now("created_at"),
    CheckConstraint(f"state IN {_FINAL}", name="final"),
    # Rows come in the order of time and stay: a few bytes for each 128 pages, and nothing for a row.
    Index("ledger_created_at_idx", "created_at", postgresql_using="brin", postgresql_with={"autosummarize": "on"}),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True),  # one incarnation: fresh at every start
    _tenant(),
    Column("state", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("running", Integer, nullable=False, server_default="0"),  # rows it holds, as of the last heartbeat
    Column("ready", SmallInteger, nullable=False, server_default="0"),  # 1: its engine answers
    Column("info", JSONB, nullable=False, server_default="{}"),
    _seconds("busy_seconds"),  # the engine's own total, to hold against the ledger
    _now("started_at"),
    _now("renewed_at"),
    Column("lease_until", DateTime(timezone=True), nullable=False),
    Column("refused_messages", BigInteger, nullable=False, server_default="0"),  # that none of us signed
    _one_of("state", WorkerState),
    Index("workers_lease_idx", "lease_until", postgresql_where=text("state IN ('live', 'draining')")),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    _tenant(),
    Column("state", Text, nullable=False),
    Column("source", JSONB, nullable=False, server_default="{}"),  # what the rows come from, to tell a changed input
    Column("input_offset", BigInteger, nullable=False, server_default="0"),  # bytes taken in
    Column("input_lines", BigInteger, nullable=False, server_default="0"),  # lines taken in, bad ones too
    _now("created_at"),
    _time("finished_at"),
    _one_of("state", BatchState),
    CheckConstraint("(finished_at IS NOT NULL) = (state IN ('finished', 'cancelled'))", name="finished_when_final"),
    Index("batches_open_idx", "state", postgresql_where=text("finished_at IS NULL")),
    Index("batches_cancelled_idx", "finished_at", postgresql_where=text("state = 'cancelled'")),
)

# Lines of a batch's input that could not become jobs.
rejections = Table(
    "rejections",
    metadata,
    Column("batch_id", Uuid, ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("line", BigInteger, primary_key=True),
    _tenant(),
    Column("custom_id", Text),
    Column("error", JSON, nullable=False),
    Index("rejections_custom_id_idx", "batch_id", "custom_id"),
)

conversations = Table(
    "conversations",
    metadata,
    Column("tenant_id", Text, primary_key=True, server_default=LOCAL_TENANT),
    Column("id", Text, primary_key=True),
    Column("turns", Integer, nullable=False),
    _now("created_at"),
    Column("metadata", JSON),
    _time("deleted_at"),
)

# What was put into a conversation by hand, and which items of its turns were taken out.
conversation_items = Table(
    "conversation_items",
    metadata,
    Column("tenant_id", Text, primary_key=True, server_default=LOCAL_TENANT),
    Column("conversation", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("position", BigInteger, Identity(), nullable=False),
    Column("after_turn", Integer, nullable=False),  # how many turns there were when it was put in
    Column("item", JSON),  # null: it is an item of a turn
    _now("created_at"),
    _time("deleted_at"),
    ForeignKeyConstraint(
        ["tenant_id", "conversation"], ["conversations.tenant_id", "conversations.id"], ondelete="CASCADE"
    ),
    CheckConstraint("item IS NOT NULL OR deleted_at IS NOT NULL", name="turns_items_are_only_deleted"),
    Index("conversation_items_order_idx", "tenant_id", "conversation", "after_turn", "position"),
)

# A file lies in pieces of one size, so that it is read and written in constant memory, from any offset.
files = Table(
    "files",
    metadata,
    Column("id", Uuid, primary_key=True),
    _tenant(),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger),  # null: it is still being written, and nobody sees it
    _now("created_at"),
    _time("expires_at"),
    _time("deleted_at"),
    Index("files_listed_idx", "tenant_id", "id"),
)

file_pieces = Table(
    "file_pieces",
    metadata,
    Column("file_id", Uuid, ForeignKey("files.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),  # from 0
    _tenant(),
    Column("data", LargeBinary, nullable=False),
)

# A batch as the API has it: a file in, two files out. Once its input was looked at, `batches` has a row of the same id.
api_batches = Table(
    "api_batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    _tenant(),
    Column("state", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Uuid, nullable=False),
    Column("output_file_id", Uuid),
    Column("error_file_id", Uuid),
    Column("output_seconds", Integer),  # how long its output files are kept; null: 30 days
    Column("idempotency_key", Text),
    Column("models", ARRAY(Text)),  # those that its requests may use; null: every model
    Column("webhook", Text),  # a URL that is told when it has ended
    Column("key_id", Uuid),  # the API key that it came in with, if that has a quota
    Column("metadata", JSON),
    Column("errors", JSON),  # faults of the file as a whole
    Column("counts", JSON),  # of the requests: how many there are, and once they have ended what became of them
    _now("created_at"),
    _time("in_progress_at"),
    _time("finalizing_at"),
    _time("completed_at"),
    _time("failed_at"),
    _time("expired_at"),
    _time("cancelling_at"),
    _time("cancelled_at"),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("runner", Uuid),  # who sees to it; without its lease nobody else may
    _time("runner_until"),
    _one_of("state", ApiBatchState),
    CheckConstraint(
        "(coalesce(completed_at, failed_at, expired_at, cancelled_at) IS NOT NULL) = "
        "(state IN ('cancelled', 'completed', 'expired', 'failed'))",
        name="stamped_when_final",
    ),
    CheckConstraint("(runner IS NULL) = (runner_until IS NULL)", name="runner_has_a_lease"),
    Index("api_batches_listed_idx", "tenant_id", "id"),
    Index(
        "api_batches_open_idx",
        "created_at",
        postgresql_where=text("state IN ('cancelling', 'finalizing', 'in_progress', 'validating')"),
    ),
    Index(
        "api_batches_idempotency_key_key",
        "tenant_id",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
)

# An end that somebody wants to be told of: made by the statement that ends the job or batch, and gone with it.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", Uuid, primary_key=True),
    _tenant(),
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE")),
    Column("batch_id", Uuid, ForeignKey("api_batches.id", ondelete="CASCADE")),
    Column("url", Text, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),  # begun; the number of the last is its token
    _now("created_at"),
    # While one is under way: when it counts as lost. Null: it is over.
    Column("next_attempt_at", DateTime(timezone=True), server_default=text("now()")),
    _time("delivered_at"),
    _time("given_up_at"),
    Column("error", Text),  # of the last attempt
    CheckConstraint("(job_id IS NULL) <> (batch_id IS NULL)", name="of_one"),
    CheckConstraint(
        "num_nonnulls(next_attempt_at, delivered_at, given_up_at) = 1", name="waits_or_is_delivered_or_given_up"
    ),
    # Each end is told once; and what is deleted finds its deliveries.
    Index("webhook_deliveries_job_id_key", "job_id", unique=True, postgresql_where=text("job_id IS NOT NULL")),
    Index("webhook_deliveries_batch_id_key", "batch_id", unique=True, postgresql_where=text("batch_id IS NOT NULL")),
    Index("webhook_deliveries_due_idx", "next_attempt_at", postgresql_where=text("next_attempt_at IS NOT NULL")),
    Index("webhook_deliveries_listed_idx", "tenant_id", "created_at"),
)

# Which of its secrets a tenant signs webhooks with; the secrets themselves are nowhere (`jobs.webhooks`).
webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("generation", Integer, nullable=False),  # from 1; a tenant without a row has 0
    _now("rotated_at"),
    CheckConstraint("generation > 0", name="generation_positive"),
)

# Who may come in over HTTP. The secret itself is nowhere; a revoked key stays, so that its id still means something.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),  # SHA-256 of the secret
    Column("tier", Text),
    Column("models", ARRAY(Text)),  # null: every model
    Column("roles", ARRAY(Text), nullable=False),
    _now("created_at"),
    _time("rotated_at"),
    _time("revoked_at"),
    UniqueConstraint("digest"),
    CheckConstraint("tenant_id <> ''", name="tenant_named"),
    CheckConstraint(f"cardinality(roles) > 0 AND roles <@ {_roles()}", name="roles_known"),
    Index("api_keys_tenant_id_idx", "tenant_id"),
)

# Tokens of a key that has a limit, in the minute that runs. Apart from the key: it is written to by every request.
quotas = Table(
    "quotas",
    metadata,
    Column("key_id", Uuid, ForeignKey("api_keys.id", ondelete="CASCADE"), primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("tokens_per_minute", BigInteger, nullable=False),
    Column("used_tokens", BigInteger, nullable=False, server_default="0"),  # reserved ones too
    # With the first request after the minute before was over.
    Column("minute_began_at", DateTime(timezone=True), nullable=False, server_default="-infinity"),
    CheckConstraint("tokens_per_minute > 0", name="limit_positive"),
    CheckConstraint("used_tokens >= 0", name="used_not_negative"),
)

# One row: the padded keys with which `headrace_tenant()` checks whom a gateway's session speaks for (`jobs.access`).
tenant_proofs = Table(
    "tenant_proofs",
    metadata,
    Column("single", Boolean, primary_key=True, server_default=text("true")),
    Column("inner_pad", LargeBinary, nullable=False),
    Column("outer_pad", LargeBinary, nullable=False),
    CheckConstraint("single", name="one_row"),
)
