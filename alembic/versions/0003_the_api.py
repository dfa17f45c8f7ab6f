"""The API"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_OWN = "tenant_id = (SELECT headrace_tenant())"
_OWN_FILE = "EXISTS (SELECT 1 FROM files f WHERE f.id = file_id)"
# Which rows may be written; those of the tenant are seen.
WRITTEN = {
    "api_batches": _OWN,
    "conversation_items": _OWN,
    "file_pieces": f"{_OWN} AND {_OWN_FILE}",
    "files": _OWN,
}

# What a gateway does for all tenants at once, and what alone it may see of them.
FUNCTIONS = {
    # Which of these jobs have ended.
    "headrace_ended(uuid[])": """
    CREATE FUNCTION headrace_ended(wanted uuid[]) RETURNS SETOF uuid LANGUAGE sql STABLE SECURITY DEFINER
    BEGIN ATOMIC
        SELECT j.id FROM jobs j WHERE j.id = ANY(wanted) AND j.finished_at IS NOT NULL;
    END
    """,
    # How many interactive jobs wait for each model.
    "headrace_waiting()": """
    CREATE FUNCTION headrace_waiting() RETURNS TABLE (model text, jobs bigint) LANGUAGE sql STABLE SECURITY DEFINER
    BEGIN ATOMIC
        SELECT j.model, count(*) FROM jobs j WHERE j.state = 'queued' AND j.lane = 'interactive' GROUP BY j.model;
    END
    """,
    # A batch that nobody sees to, the oldest first, taken for some seconds.
    "headrace_take_batch(uuid,double precision)": """
    CREATE FUNCTION headrace_take_batch(taker uuid, seconds double precision) RETURNS TABLE (id uuid, tenant_id text)
    LANGUAGE sql VOLATILE SECURITY DEFINER
    BEGIN ATOMIC
        UPDATE api_batches b SET runner = taker, runner_until = now() + make_interval(secs => seconds)
        WHERE b.id = (
            SELECT o.id FROM api_batches o
            WHERE o.state IN ('cancelling', 'finalizing', 'in_progress', 'validating')
              AND (o.runner_until IS NULL OR o.runner_until < now())
            ORDER BY o.created_at LIMIT 1 FOR UPDATE SKIP LOCKED
        )
        RETURNING b.id, b.tenant_id;
    END
    """,
    # Some pieces of files that are deleted, expired or were never finished, and that no batch needs.
    "headrace_tidy_files(integer)": """
    CREATE FUNCTION headrace_tidy_files(most integer) RETURNS SETOF integer LANGUAGE sql VOLATILE SECURITY DEFINER
    BEGIN ATOMIC
        WITH gone AS (
            SELECT p.file_id, p.number FROM file_pieces p JOIN files f ON f.id = p.file_id
            WHERE (f.deleted_at IS NOT NULL OR f.expires_at <= now()
                   OR (f.bytes IS NULL AND f.created_at < now() - interval '1 day'))
              AND NOT EXISTS (
                SELECT 1 FROM api_batches b
                WHERE b.input_file_id = f.id AND b.state IN ('cancelling', 'finalizing', 'in_progress', 'validating')
            )
            LIMIT most FOR UPDATE OF p SKIP LOCKED
        )
        DELETE FROM file_pieces p USING gone g WHERE p.file_id = g.file_id AND p.number = g.number RETURNING p.number;
    END
    """,
}


def upgrade() -> None:
    op.create_table(
        "api_batches",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("input_file_id", sa.Uuid(), nullable=False),
        sa.Column("output_file_id", sa.Uuid(), nullable=True),
        sa.Column("error_file_id", sa.Uuid(), nullable=True),
        sa.Column("output_seconds", sa.Integer(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("models", postgresql.ARRAY(sa.Text()), nullable=True),
        sa.Column("metadata", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("errors", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("counts", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("in_progress_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finalizing_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("failed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancelling_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancelled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("runner", sa.Uuid(), nullable=True),
        sa.Column("runner_until", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(coalesce(completed_at, failed_at, expired_at, cancelled_at) IS NOT NULL) = "
            "(state IN ('cancelled', 'completed', 'expired', 'failed'))",
            name=op.f("api_batches_stamped_when_final"),
        ),
        sa.CheckConstraint(
            "state IN ('cancelled', 'cancelling', 'completed', 'expired', 'failed', 'finalizing', "
            "'in_progress', 'validating')",
            name=op.f("api_batches_state_known"),
        ),
        sa.CheckConstraint("(runner IS NULL) = (runner_until IS NULL)", name=op.f("api_batches_runner_has_a_lease")),
        sa.PrimaryKeyConstraint("id", name=op.f("api_batches_pkey")),
    )
    op.create_index(
        "api_batches_idempotency_key_key",
        "api_batches",
        ["tenant_id", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index("api_batches_listed_idx", "api_batches", ["tenant_id", "id"], unique=False)
    op.create_index(
        "api_batches_open_idx",
        "api_batches",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('cancelling', 'finalizing', 'in_progress', 'validating')"),
    )
    op.create_table(
        "conversation_items",
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("conversation", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("after_turn", sa.Integer(), nullable=False),
        sa.Column("item", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "item IS NOT NULL OR deleted_at IS NOT NULL", name=op.f("conversation_items_turns_items_are_only_deleted")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "conversation"],
            ["conversations.tenant_id", "conversations.id"],
            name=op.f("conversation_items_tenant_id_conversation_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "conversation", "id", name=op.f("conversation_items_pkey")),
    )
    op.create_index(
        "conversation_items_order_idx",
        "conversation_items",
        ["tenant_id", "conversation", "after_turn", "position"],
        unique=False,
    )
    op.create_table(
        "files",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("files_pkey")),
    )
    op.create_index("files_listed_idx", "files", ["tenant_id", "id"], unique=False)
    op.create_table(
        "file_pieces",
        sa.Column("file_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.Text(), server_default="local", nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("file_pieces_file_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("file_id", "number", name=op.f("file_pieces_pkey")),
    )
    op.add_column("conversations", sa.Column("metadata", postgresql.JSON(astext_type=sa.Text()), nullable=True))
    op.add_column("conversations", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("payloads", sa.Column("call", postgresql.JSON(astext_type=sa.Text()), nullable=True))
    op.add_column("payloads", sa.Column("forgotten_at", sa.DateTime(timezone=True), nullable=True))
    for signature, function in FUNCTIONS.items():
        op.execute(function)
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
    for table, written in WRITTEN.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant ON {table} USING ({_OWN}) WITH CHECK ({written})")


def downgrade() -> None:
    for signature in FUNCTIONS:
        op.execute(f"DROP FUNCTION {signature}")
    op.drop_column("payloads", "forgotten_at")
    op.drop_column("payloads", "call")
    op.drop_column("conversations", "deleted_at")
    op.drop_column("conversations", "metadata")
    op.drop_table("file_pieces")
    op.drop_index("files_listed_idx", table_name="files")
    op.drop_table("files")
    op.drop_index("conversation_items_order_idx", table_name="conversation_items")
    op.drop_table("conversation_items")
    op.drop_index(
        "api_batches_open_idx",
        table_name="api_batches",
        postgresql_where=sa.text("state IN ('cancelling', 'finalizing', 'in_progress', 'validating')"),
    )
    op.drop_index("api_batches_listed_idx", table_name="api_batches")
    op.drop_index(
        "api_batches_idempotency_key_key",
        table_name="api_batches",
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.drop_table("api_batches")
