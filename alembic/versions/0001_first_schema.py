"""The first schema"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("source", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False),
        sa.Column("input_offset", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("input_lines", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(finished_at IS NOT NULL) = (state IN ('finished', 'cancelled'))", name=op.f("batches_finished_when_final")
        ),
        sa.CheckConstraint(
            "state IN ('cancelled', 'filling', 'finished', 'paused', 'running')", name=op.f("batches_state_known")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("batches_pkey")),
    )
    op.create_index(
        "batches_open_idx", "batches", ["state"], unique=False, postgresql_where=sa.text("finished_at IS NULL")
    )
    op.create_index(
        "batches_cancelled_idx",
        "batches",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("state = 'cancelled'"),
    )
    op.create_table(
        "conversations",
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("turns", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("conversations_pkey")),
    )
    op.create_table(
        "ledger",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("batch_id", sa.Uuid(), nullable=True),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), server_default="0", nullable=False),
        sa.Column("cached_tokens", sa.Integer(), server_default="0", nullable=False),
        sa.Column("completion_tokens", sa.Integer(), server_default="0", nullable=False),
        sa.Column("busy_seconds", sa.Double(), server_default="0", nullable=False),
        sa.Column("token_dollars", sa.Numeric(precision=20, scale=12), server_default="0", nullable=False),
        sa.Column("machine_dollars", sa.Numeric(precision=20, scale=12), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('cancelled', 'expired', 'failed', 'succeeded')", name=op.f("ledger_final")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("ledger_pkey")),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("running", sa.Integer(), server_default="0", nullable=False),
        sa.Column("ready", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("info", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False),
        sa.Column("busy_seconds", sa.Double(), server_default="0", nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("renewed_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state IN ('dead', 'draining', 'live', 'stopped')", name=op.f("workers_state_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("workers_pkey")),
    )
    op.create_index(
        "workers_lease_idx",
        "workers",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("state IN ('live', 'draining')"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("max_attempts", sa.SmallInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("run_after", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("worker_id", sa.Uuid(), nullable=True),
        sa.Column("token", sa.Uuid(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("conversation", sa.Text(), nullable=True),
        sa.Column("turn", sa.Integer(), nullable=True),
        sa.Column("batch_id", sa.Uuid(), nullable=True),
        sa.Column("line", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "(finished_at IS NOT NULL) = (state IN ('cancelled', 'expired', 'failed', 'succeeded'))",
            name=op.f("jobs_finished_when_final"),
        ),
        sa.CheckConstraint("(lane = 'bulk') = (batch_id IS NOT NULL)", name=op.f("jobs_bulk_in_a_batch")),
        sa.CheckConstraint(
            "(state = 'running') = (token IS NOT NULL) AND (token IS NULL) = (worker_id IS NULL)",
            name=op.f("jobs_held_when_running"),
        ),
        sa.CheckConstraint("lane IN ('bulk', 'interactive')", name=op.f("jobs_lane_known")),
        sa.CheckConstraint("state <> 'blocked' OR turn > 1", name=op.f("jobs_only_later_turns_block")),
        sa.CheckConstraint("state <> 'running' OR started_at IS NOT NULL", name=op.f("jobs_started_when_running")),
        sa.CheckConstraint(
            "state IN ('blocked', 'cancelled', 'expired', 'failed', 'queued', 'running', 'succeeded')",
            name=op.f("jobs_state_known"),
        ),
        sa.CheckConstraint("(batch_id IS NULL) = (line IS NULL)", name=op.f("jobs_line_in_a_batch")),
        sa.CheckConstraint("(conversation IS NULL) = (turn IS NULL)", name=op.f("jobs_turn_in_a_conversation")),
        sa.CheckConstraint("attempts BETWEEN 0 AND max_attempts", name=op.f("jobs_attempts_bounded")),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("jobs_batch_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("jobs_pkey")),
    )
    op.create_index(
        "jobs_backlog_idx",
        "jobs",
        ["batch_id", "model", "priority", "line"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND lane = 'bulk'"),
    )
    op.create_index(
        "jobs_batch_line_idx",
        "jobs",
        ["batch_id", "line"],
        unique=False,
        postgresql_where=sa.text("batch_id IS NOT NULL"),
    )
    op.create_index(
        "jobs_deadline_idx",
        "jobs",
        ["deadline_at"],
        unique=False,
        postgresql_where=sa.text("deadline_at IS NOT NULL AND finished_at IS NULL"),
    )
    op.create_index(
        "jobs_idempotency_key_key",
        "jobs",
        ["tenant_id", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index("jobs_listed_idx", "jobs", ["tenant_id", "id"], unique=False)
    op.create_index(
        "jobs_running_idx", "jobs", ["worker_id"], unique=False, postgresql_where=sa.text("state = 'running'")
    )
    op.create_index(
        "jobs_started_idx",
        "jobs",
        ["model", "priority", "started_at"],
        unique=False,
        postgresql_where=sa.text("lane = 'interactive'"),
    )
    op.create_index(
        "jobs_turn_key",
        "jobs",
        ["tenant_id", "conversation", "turn"],
        unique=True,
        postgresql_where=sa.text("turn IS NOT NULL"),
    )
    op.create_index(
        "jobs_waiting_idx",
        "jobs",
        ["model", "priority", "run_after"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND lane = 'interactive'"),
    )
    op.create_table(
        "rejections",
        sa.Column("batch_id", sa.Uuid(), nullable=False),
        sa.Column("line", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=True),
        sa.Column("error", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("rejections_batch_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", "line", name=op.f("rejections_pkey")),
    )
    op.create_index("rejections_custom_id_idx", "rejections", ["batch_id", "custom_id"], unique=False)
    op.create_table(
        "attempts",
        sa.Column("token", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("busy_seconds", sa.Double(), server_default="0", nullable=False),
        sa.Column("machine_dollars", sa.Numeric(precision=20, scale=12), server_default="0", nullable=False),
        sa.CheckConstraint(
            "outcome IN ('cancelled', 'expired', 'failed', 'lost', 'released', 'retried', 'succeeded')",
            name=op.f("attempts_outcome_known"),
        ),
        sa.CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name=op.f("attempts_closed_once")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("attempts_job_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("token", name=op.f("attempts_pkey")),
    )
    op.create_index("attempts_job_id_idx", "attempts", ["job_id"], unique=False)
    op.create_table(
        "payloads",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=True),
        sa.Column("endpoint", sa.Text(), nullable=True),
        sa.Column("request", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("metadata", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("payloads_job_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("payloads_pkey")),
    )
    op.create_table(
        "results",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("choices", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("error", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("usage", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("timings", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("served_by", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("results_job_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("results_pkey")),
    )


def downgrade() -> None:
    op.drop_table("results")
    op.drop_table("payloads")
    op.drop_index("attempts_job_id_idx", table_name="attempts")
    op.drop_table("attempts")
    op.drop_index("rejections_custom_id_idx", table_name="rejections")
    op.drop_table("rejections")
    op.drop_index(
        "jobs_waiting_idx", table_name="jobs", postgresql_where=sa.text("state = 'queued' AND lane = 'interactive'")
    )
    op.drop_index("jobs_turn_key", table_name="jobs", postgresql_where=sa.text("turn IS NOT NULL"))
    op.drop_index("jobs_started_idx", table_name="jobs", postgresql_where=sa.text("lane = 'interactive'"))
    op.drop_index("jobs_running_idx", table_name="jobs", postgresql_where=sa.text("state = 'running'"))
    op.drop_index("jobs_listed_idx", table_name="jobs")
    op.drop_index(
        "jobs_idempotency_key_key", table_name="jobs", postgresql_where=sa.text("idempotency_key IS NOT NULL")
    )
    op.drop_index(
        "jobs_deadline_idx",
        table_name="jobs",
        postgresql_where=sa.text("deadline_at IS NOT NULL AND finished_at IS NULL"),
    )
    op.drop_index("jobs_batch_line_idx", table_name="jobs", postgresql_where=sa.text("batch_id IS NOT NULL"))
    op.drop_index("jobs_backlog_idx", table_name="jobs", postgresql_where=sa.text("state = 'queued' AND lane = 'bulk'"))
    op.drop_table("jobs")
    op.drop_index("workers_lease_idx", table_name="workers", postgresql_where=sa.text("state IN ('live', 'draining')"))
    op.drop_table("workers")
    op.drop_table("ledger")
    op.drop_table("conversations")
    op.drop_index("batches_cancelled_idx", table_name="batches", postgresql_where=sa.text("state = 'cancelled'"))
    op.drop_index("batches_open_idx", table_name="batches", postgresql_where=sa.text("finished_at IS NULL"))
    op.drop_table("batches")
