"""Webhooks"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_OWN = "tenant_id = (SELECT headrace_tenant())"
_OWN_JOB = "job_id IS NULL OR EXISTS (SELECT 1 FROM jobs j WHERE j.id = job_id)"
_OWN_BATCH = "batch_id IS NULL OR EXISTS (SELECT 1 FROM api_batches b WHERE b.id = batch_id)"

# Which rows may be written; those of the tenant are seen.
WRITTEN = {"webhook_deliveries": f"{_OWN} AND ({_OWN_JOB}) AND ({_OWN_BATCH})", "webhook_secrets": "false"}

_TAKE = "headrace_take_webhooks(integer,double precision,text[])"
# What a gateway sends for all tenants: the deliveries that are due, the longest due first, each taken for some seconds.
# Those of some tenants are left.
FUNCTION = """
CREATE FUNCTION headrace_take_webhooks(most integer, seconds double precision, but text[])
RETURNS TABLE (id uuid, tenant_id text, job_id uuid, batch_id uuid, url text, attempts integer)
LANGUAGE sql VOLATILE SECURITY DEFINER
BEGIN ATOMIC
    WITH due AS (
        SELECT d.id FROM webhook_deliveries d
        WHERE d.next_attempt_at <= now() AND NOT d.tenant_id = ANY(but)
        ORDER BY d.next_attempt_at LIMIT most FOR UPDATE SKIP LOCKED
    )
    UPDATE webhook_deliveries w
    SET attempts = w.attempts + 1, next_attempt_at = now() + make_interval(secs => seconds)
    FROM due WHERE w.id = due.id
    RETURNING w.id, w.tenant_id, w.job_id, w.batch_id, w.url, w.attempts;
END
"""


def upgrade() -> None:
    op.add_column("payloads", sa.Column("webhook", sa.Text(), nullable=True))
    op.add_column("api_batches", sa.Column("webhook", sa.Text(), nullable=True))
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("batch_id", sa.Uuid(), nullable=True),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=True),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("given_up_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint("(job_id IS NULL) <> (batch_id IS NULL)", name=op.f("webhook_deliveries_of_one")),
        sa.CheckConstraint(
            "num_nonnulls(next_attempt_at, delivered_at, given_up_at) = 1",
            name=op.f("webhook_deliveries_waits_or_is_delivered_or_given_up"),
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("webhook_deliveries_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["api_batches.id"], name=op.f("webhook_deliveries_batch_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("webhook_deliveries_pkey")),
    )
    for of in ("job_id", "batch_id"):
        op.create_index(
            f"webhook_deliveries_{of}_key",
            "webhook_deliveries",
            [of],
            unique=True,
            postgresql_where=sa.text(f"{of} IS NOT NULL"),
        )
    op.create_index(
        "webhook_deliveries_due_idx",
        "webhook_deliveries",
        ["next_attempt_at"],
        unique=False,
        postgresql_where=sa.text("next_attempt_at IS NOT NULL"),
    )
    op.create_index("webhook_deliveries_listed_idx", "webhook_deliveries", ["tenant_id", "created_at"], unique=False)
    op.create_table(
        "webhook_secrets",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("rotated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("generation > 0", name=op.f("webhook_secrets_generation_positive")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("webhook_secrets_pkey")),
    )
    op.execute(FUNCTION)
    op.execute(f"REVOKE ALL ON FUNCTION {_TAKE} FROM PUBLIC")
    for table, written in WRITTEN.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant ON {table} USING ({_OWN}) WITH CHECK ({written})")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {_TAKE}")
    op.drop_table("webhook_secrets")
    op.drop_table("webhook_deliveries")
    op.drop_column("api_batches", "webhook")
    op.drop_column("payloads", "webhook")
