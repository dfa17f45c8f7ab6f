"""The usual way: one Celery task a job, one commit a job. What a user would write without Headrace.

Defaults are left alone but for what a sensible user sets: results of bulk tasks are ignored, since rows carry them.
The task does what the echo engine does, in its own process: it has no engine to talk to, which favours it.
"""

import os
import threading
from uuid import UUID

import psycopg
from celery import Celery

app = Celery("plain", broker=os.environ["PLAIN_BROKER_URL"], backend=os.environ["PLAIN_BROKER_URL"])
app.conf.update(task_default_queue="plain", broker_connection_retry_on_startup=True)

_local = threading.local()


def connection() -> psycopg.Connection:
    """One connection a thread, or a process, kept open."""
    if not hasattr(_local, "connection"):
        _local.connection = psycopg.connect(os.environ["PLAIN_DATABASE_URL"])
    kept: psycopg.Connection = _local.connection
    return kept


def answer_of(prompt: str) -> str:
    """What the echo engine answers."""
    return prompt


@app.task(ignore_result=True)  # type: ignore[untyped-decorator]
def bulk(job_id: str, prompt: str) -> None:
    """Answer, and commit the row."""
    with connection().transaction():
        connection().execute(
            "INSERT INTO plain_jobs (id, prompt, answer) VALUES (%s, %s, %s)",
            (UUID(job_id), prompt, answer_of(prompt)),
        )


@app.task  # type: ignore[untyped-decorator]
def interactive(job_id: str) -> str:
    """Read the row committed at submit, answer, commit, and return the answer through the result backend."""
    with connection().transaction():
        row = connection().execute("SELECT prompt FROM plain_jobs WHERE id = %s", (UUID(job_id),)).fetchone()
        assert row is not None
        connection().execute("UPDATE plain_jobs SET answer = %s WHERE id = %s", (answer_of(row[0]), UUID(job_id)))
    return answer_of(row[0])


def submit_interactive(job_id: UUID, prompt: str) -> str:
    """Commit the row, send the task, wait for its result."""
    with connection().transaction():
        connection().execute("INSERT INTO plain_jobs (id, prompt) VALUES (%s, %s)", (job_id, prompt))
    answer: str = interactive.delay(str(job_id)).get(timeout=60)
    return answer
