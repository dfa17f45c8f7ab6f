"""The two systems that are compared, on the same Postgres and Redis: a Headrace stack, and plain Celery."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from headrace.servers import Servers
from headrace.stack import Stack
from jobs.settings import Settings

_REPOSITORY = Path(__file__).resolve().parent.parent
_START_SECONDS = 60.0


@contextmanager
def servers() -> Iterator[Servers]:
    """Postgres and Redis for one benchmark."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as home, Servers(Path(home)) as running:
        yield running


@contextmanager
def headrace_stack(running: Servers, model: str = "echo") -> Iterator[Settings]:
    """One Headrace worker for the model on these servers; gives the settings of a producer."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as home:
        settings = Settings.load(
            home=home, database_url=running.database_url, broker_url=running.broker_url, secret=running.secret
        )
        with Stack(settings, [model], with_flower=False, command="run") as stack:
            yield stack.settings


class PlainCelery:
    """What a Celery user has: one worker process of tasks that commit a row each."""

    def __init__(self, running: Servers, pool: str, concurrency: int) -> None:
        self.database_url = make_url(running.database_url).set(drivername="postgresql").render_as_string(False)
        self.broker_url = running.broker_url
        self.pool = pool
        self.concurrency = concurrency

    @contextmanager
    def running(self) -> Iterator[None]:
        """The worker, until the end of the block."""
        self._make_table()
        environment = os.environ | {
            "PLAIN_DATABASE_URL": self.database_url,
            "PLAIN_BROKER_URL": self.broker_url,
        }
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.plain_celery", "worker"]
        command += ["--pool", self.pool, "--concurrency", str(self.concurrency), "--loglevel", "WARNING"]
        worker = subprocess.Popen(
            command, cwd=_REPOSITORY, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        try:
            os.environ |= {name: environment[name] for name in environment if name.startswith("PLAIN_")}
            self._forget_other_servers()
            self._await_worker()
            yield
        finally:
            worker.terminate()
            worker.wait()

    def _forget_other_servers(self) -> None:
        """The client's Celery application reads its servers when it is imported, perhaps for an earlier benchmark."""
        module = sys.modules.get("benchmarks.plain_celery")
        if module is not None and module.app.conf.broker_url != self.broker_url:
            del sys.modules["benchmarks.plain_celery"]

    def _make_table(self) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute("DROP TABLE IF EXISTS plain_jobs")
            connection.execute("CREATE TABLE plain_jobs (id uuid PRIMARY KEY, prompt text, answer text)")

    def _await_worker(self) -> None:
        from benchmarks.plain_celery import app

        deadline = time.monotonic() + _START_SECONDS
        while not app.control.inspect(timeout=0.2).active_queues():
            if time.monotonic() > deadline:
                raise RuntimeError("the Celery worker did not start")
