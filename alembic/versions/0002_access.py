"""API keys, quotas, and row security"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_OWN = "tenant_id = (SELECT headrace_tenant())"
_OWN_JOB = "EXISTS (SELECT 1 FROM jobs j WHERE j.id = job_id)"
_OWN_BATCH = "EXISTS (SELECT 1 FROM batches b WHERE b.id = batch_id)"

# Which rows are seen, which may be written. None: nobody but the owner. `jobs/access.py` says why.
POLICIES = {
    "jobs": (_OWN, f"{_OWN} AND (batch_id IS NULL OR {_OWN_BATCH})"),
    "payloads": (_OWN, _OWN),
    "results": (_OWN, f"{_OWN} AND {_OWN_JOB}"),
    "attempts": (_OWN, f"{_OWN} AND {_OWN_JOB}"),
    "ledger": (_OWN, f"{_OWN} AND {_OWN_JOB}"),
    "batches": (_OWN, _OWN),
    "rejections": (_OWN, f"{_OWN} AND {_OWN_BATCH}"),
    "conversations": (_OWN, _OWN),
    "quotas": (_OWN, _OWN),
    "workers": ("true", "false"),
    "api_keys": None,
    "tenant_proofs": None,
}

# The bodies are parsed when they are made, so that no search path decides later which tables they mean.
FUNCTIONS = (
    # Which tenant the session speaks for; null without a proof. HMAC-SHA256 of the tenant's name, by RFC 2104.
    """
    CREATE FUNCTION headrace_tenant() RETURNS text LANGUAGE sql STABLE SECURITY DEFINER
    BEGIN ATOMIC
        SELECT said.tenant
        FROM tenant_proofs k, (
            SELECT current_setting('headrace.tenant', true) AS tenant, current_setting('headrace.proof', true) AS proof
        ) said
        WHERE said.proof = encode(sha256(k.outer_pad || sha256(k.inner_pad || convert_to(said.tenant, 'UTF8'))), 'hex');
    END
    """,
    # The key whose digest this is, for those who may not see the table.
    """
    CREATE FUNCTION headrace_key(wanted bytea) RETURNS TABLE (
        id uuid, tenant_id text, tier text, models text[], roles text[], tokens_per_minute bigint, digest bytea
    ) LANGUAGE sql STABLE SECURITY DEFINER
    BEGIN ATOMIC
        SELECT k.id, k.tenant_id, k.tier, k.models, k.roles, q.tokens_per_minute, k.digest
        FROM api_keys k LEFT JOIN quotas q ON q.key_id = k.id
        WHERE k.digest = wanted AND k.revoked_at IS NULL;
    END
    """,
)


def upgrade() -> None:
    op.add_column("jobs", sa.Column("key_id", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("reserved_tokens", sa.Integer(), nullable=True))
    op.add_column("payloads", sa.Column("policy", postgresql.JSON(astext_type=sa.Text()), nullable=True))
    op.create_check_constraint(
        op.f("jobs_reserved_under_a_key"), "jobs", "(key_id IS NULL) = (reserved_tokens IS NULL)"
    )
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
        sa.Column("minute_began_at", sa.DateTime(timezone=True), server_default="-infinity", nullable=False),
        sa.CheckConstraint("tokens_per_minute > 0", name=op.f("quotas_limit_positive")),
        sa.CheckConstraint("used_tokens >= 0", name=op.f("quotas_used_not_negative")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("quotas_key_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("key_id", name=op.f("quotas_pkey")),
    )
    op.create_table(
        "tenant_proofs",
        sa.Column("single", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("inner_pad", sa.LargeBinary(), nullable=False),
        sa.Column("outer_pad", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("single", name=op.f("tenant_proofs_one_row")),
        sa.PrimaryKeyConstraint("single", name=op.f("tenant_proofs_pkey")),
    )
    for function in FUNCTIONS:
        op.execute(function)
    op.execute("REVOKE ALL ON FUNCTION headrace_tenant(), headrace_key(bytea) FROM PUBLIC")
    for table, policy in POLICIES.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        if policy is not None:
            seen, written = policy
            op.execute(f"CREATE POLICY tenant ON {table} USING ({seen}) WITH CHECK ({written})")


def downgrade() -> None:
    for table, policy in POLICIES.items():
        if policy is not None:
            op.execute(f"DROP POLICY tenant ON {table}")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    op.execute("DROP FUNCTION headrace_key(bytea)")
    op.execute("DROP FUNCTION headrace_tenant()")
    op.drop_table("tenant_proofs")
    op.drop_table("quotas")
    op.drop_index("api_keys_tenant_id_idx", table_name="api_keys")
    op.drop_table("api_keys")
    op.drop_constraint(op.f("jobs_reserved_under_a_key"), "jobs")
    op.drop_column("payloads", "policy")
    op.drop_column("jobs", "reserved_tokens")
    op.drop_column("jobs", "key_id")
