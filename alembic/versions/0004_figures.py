"""Figures of the whole for whoever watches"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# What a gateway tells of all tenants at once: numbers, no names but those of models.
FUNCTIONS = {
    # Jobs that have not ended; each kind is counted in an index of its own. How long the oldest could have started.
    "headrace_open_jobs()": """
    CREATE FUNCTION headrace_open_jobs()
    RETURNS TABLE (model text, lane text, state text, jobs bigint, oldest_seconds double precision)
    LANGUAGE sql STABLE SECURITY DEFINER
    BEGIN ATOMIC
        SELECT j.model, 'interactive', 'queued', count(*), coalesce(extract(epoch FROM now() - min(j.run_after) FILTER (
            WHERE j.run_after <= now()
        )), 0)::double precision
        FROM jobs j WHERE j.state = 'queued' AND j.lane = 'interactive' GROUP BY j.model
        UNION ALL
        SELECT j.model, 'bulk', 'queued', count(*), 0
        FROM jobs j WHERE j.state = 'queued' AND j.lane = 'bulk' GROUP BY j.model
        UNION ALL
        SELECT j.model, j.lane, 'running', count(*), 0
        FROM jobs j WHERE j.state = 'running' GROUP BY j.model, j.lane
        UNION ALL
        SELECT j.model, j.lane, 'blocked', count(*), 0
        FROM jobs j WHERE j.state = 'blocked' GROUP BY j.model, j.lane;
    END
    """,
    # What the ledger has had from a time on, apart by whether it came after another time.
    "headrace_ends(timestamp with time zone,timestamp with time zone)": """
    CREATE FUNCTION headrace_ends(since timestamptz, fresh_since timestamptz)
    RETURNS TABLE (model text, lane text, state text, fresh boolean, jobs bigint, prompt_tokens bigint,
                   cached_tokens bigint, completion_tokens bigint)
    LANGUAGE sql STABLE SECURITY DEFINER
    BEGIN ATOMIC
        SELECT l.model, CASE WHEN l.batch_id IS NULL THEN 'interactive' ELSE 'bulk' END, l.state,
               l.created_at >= fresh_since, count(*), sum(l.prompt_tokens), sum(l.cached_tokens),
               sum(l.completion_tokens)
        FROM ledger l WHERE l.created_at >= since GROUP BY 1, 2, 3, 4;
    END
    """,
}


def upgrade() -> None:
    op.add_column("workers", sa.Column("refused_messages", sa.BigInteger(), server_default="0", nullable=False))
    op.create_index("jobs_blocked_idx", "jobs", ["model"], unique=False, postgresql_where=sa.text("state = 'blocked'"))
    op.create_index(
        "ledger_created_at_idx",
        "ledger",
        ["created_at"],
        unique=False,
        postgresql_using="brin",
        postgresql_with={"autosummarize": "on"},
    )
    for signature, function in FUNCTIONS.items():
        op.execute(function)
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")


def downgrade() -> None:
    for signature in FUNCTIONS:
        op.execute(f"DROP FUNCTION {signature}")
    op.drop_index("ledger_created_at_idx", table_name="ledger")
    op.drop_index("jobs_blocked_idx", table_name="jobs", postgresql_where=sa.text("state = 'blocked'"))
    op.drop_column("workers", "refused_messages")
