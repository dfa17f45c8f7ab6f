"""API keys and quotas"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("tier", sa.Text(), nullable=True),
        sa.Column("models", postgresql.ARRAY(sa.Text()), nullable=True),
        sa.Column("roles", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("rotated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("tenant_id <> ''", name=op.f("api_keys_tenant_named")),
        sa.CheckConstraint(
            "cardinality(roles) > 0 AND roles <@ ARRAY['admin'::text, 'read'::text, 'submit'::text]",
            name=op.f("api_keys_roles_known"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
        sa.UniqueConstraint("digest", name=op.f("api_keys_digest_key")),
    )
    op.create_index("api_keys_tenant_id_idx", "api_keys", ["tenant_id"], unique=False)
    op.create_table(
        "quotas",
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=False),
        sa.Column("used_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("minute_began_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("tokens_per_minute > 0", name=op.f("quotas_limit_positive")),
        sa.CheckConstraint("used_tokens >= 0", name=op.f("quotas_used_not_negative")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("quotas_key_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("key_id", name=op.f("quotas_pkey")),
    )


def downgrade() -> None:
    op.drop_table("quotas")
    op.drop_index("api_keys_tenant_id_idx", table_name="api_keys")
    op.drop_table("api_keys")
