"""Responses that go on from one which still runs"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_ONLY_LATER_TURNS_BLOCK = "jobs_only_later_turns_block"

# What a gateway looks for, for all tenants: blocked jobs whose predecessor has ended, or is not there any more.
FUNCTION = """
CREATE FUNCTION headrace_followers(most integer) RETURNS TABLE (id uuid, tenant_id text, after_id uuid)
LANGUAGE sql STABLE SECURITY DEFINER
BEGIN ATOMIC
    SELECT f.id, f.tenant_id, f.after_id FROM jobs f
    WHERE f.state = 'blocked' AND f.after_id IS NOT NULL
      AND NOT EXISTS (SELECT 1 FROM jobs b WHERE b.id = f.after_id AND b.finished_at IS NULL)
    LIMIT most;
END
"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("after_id", sa.Uuid(), nullable=True))
    op.create_index(
        "jobs_after_idx",
        "jobs",
        ["after_id"],
        unique=False,
        postgresql_where=sa.text("state = 'blocked' AND after_id IS NOT NULL"),
    )
    op.drop_constraint(op.f(_ONLY_LATER_TURNS_BLOCK), "jobs")
    op.create_check_constraint(
        op.f(_ONLY_LATER_TURNS_BLOCK), "jobs", "state <> 'blocked' OR turn > 1 OR after_id IS NOT NULL"
    )
    op.execute(FUNCTION)
    op.execute("REVOKE ALL ON FUNCTION headrace_followers(integer) FROM PUBLIC")


def downgrade() -> None:
    op.execute("DROP FUNCTION headrace_followers(integer)")
    op.drop_constraint(op.f(_ONLY_LATER_TURNS_BLOCK), "jobs")
    op.create_check_constraint(op.f(_ONLY_LATER_TURNS_BLOCK), "jobs", "state <> 'blocked' OR turn > 1")
    op.drop_index("jobs_after_idx", table_name="jobs")
    op.drop_column("jobs", "after_id")
