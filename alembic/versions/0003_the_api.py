"""The API"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


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


def downgrade() -> None:
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
