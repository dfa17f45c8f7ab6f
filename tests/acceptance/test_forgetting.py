"""What was asked and answered is nowhere after a purge, and secrets are never where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from headrace.servers import Servers
from jobs.database import Database
from jobs.errors import RequestInvalid
from jobs.keys import Keys
from jobs.retention import Retention
from jobs.states import State
from jobs.tables import metadata
from kit.databases import migrated_template
from kit.systems import PATIENCE_SECONDS, System, system_on
from kit.waiting import wait_until
from producer.bulk import BulkOptions, BulkRun

CANARY = "canary 7d1f0c"
MODELS = {"slow": {"engine": "echo", "slots": 2, "seconds_per_token": 0.02}}


@pytest.fixture
def system(own_servers: Servers, tmp_path: Path) -> Iterator[System]:
    """On servers of its own, whose logs are read too."""
    with (
        migrated_template(own_servers.database_url) as template,
        system_on(own_servers, template, tmp_path / "system", models=MODELS) as system,
    ):
        yield system


def test_after_a_purge_the_text_is_nowhere_and_the_bills_are_there(
    system: System, own_servers: Servers, tmp_path: Path
) -> None:
    """Jobs of every end, turns, a batch with a bad line: tables, Redis, our files and logs are searched."""
    system.start("echo")
    system.start("slow")
    jobs = _live(system, tmp_path / "bulk")
    assert "payloads" in _tables_with(system, CANARY)
    with closing(Database(str(system.settings.database_url))) as database:
        assert Retention(database).purge(0).jobs == len(jobs)
    assert _tables_with(system, CANARY) == set()
    assert system.tables.value("SELECT count(*) FROM ledger") == len(jobs)
    assert _redis_with(system, CANARY) == []
    assert _files_with([tmp_path / "system"], CANARY) == []
    assert CANARY not in "".join(log.read_text(errors="replace") for log in own_servers.folder.glob("*/log"))


def _live(system: System, folder: Path) -> set[Any]:
    """A bit of everything; the ids of all jobs."""
    producer = system.producer
    asked = [
        producer.submit(model="echo", prompt=f"{CANARY} {number}", idempotency_key=f"k{number}") for number in range(3)
    ]
    _make_postgres_complain(system)
    asked += [
        producer.submit(model="echo", messages=[{"role": "user", "content": CANARY}], conversation="talk")
        for _ in range(2)
    ]
    for job in asked:
        assert CANARY in system.wait(job.id).text
    cancelled = producer.submit(model="slow", prompt=CANARY * 50)
    wait_until(lambda: producer.get(cancelled.id).state is State.RUNNING, PATIENCE_SECONDS, "it runs")
    producer.cancel(cancelled.id)
    system.wait(cancelled.id)
    with pytest.raises(RequestInvalid):
        producer.submit(model="echo", prompt=CANARY, logprobs=1)
    _bulk(system, folder)
    return {job.id for job in producer.list(limit=1000)}


def _make_postgres_complain(system: System) -> None:
    """About a row that holds the text."""
    row = "INSERT INTO conversations (tenant_id, id, turns) VALUES ('local', %s, 1)"
    system.tables.execute(row, CANARY)
    with pytest.raises(psycopg.errors.UniqueViolation):
        system.tables.execute(row, CANARY)


def _bulk(system: System, folder: Path) -> None:
    folder.mkdir()
    source = folder / "in.jsonl"
    lines = [{"custom_id": CANARY, "text": CANARY}, {"custom_id": "bad", "text": 7, "more": CANARY}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = BulkRun(system.producer, BulkOptions(source, folder / "out.jsonl", None, "echo", "text"))
    run.open()
    assert run.run(lambda _: None, lambda _: None).succeeded == 1


def _tables_with(system: System, text: str) -> set[str]:
    found = "SELECT count(*) FROM {0} WHERE {0}::text LIKE %s"
    return {name for name in metadata.tables if system.tables.value(found.format(name), f"%{text}%")}


def _redis_with(system: System, text: str) -> list[bytes]:
    """Keys whose name or value, of whatever type, holds the text."""
    with redis.Redis.from_url(str(system.settings.broker_url)) as client:
        keys = list(client.scan_iter("*"))
        assert keys  # Celery's bindings, at the least
        return [key for key in keys if text.encode() in key + (client.dump(key) or b"")]


def _files_with(folders: list[Path], text: str) -> list[str]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "log" for path in files)
    return [str(path) for path in files if text.encode() in path.read_bytes()]


def test_no_log_holds_a_secret(system: System, own_servers: Servers, tmp_path: Path) -> None:
    """Not the passwords, not the one that signs, no key; also not when servers are lost and everybody complains."""
    with closing(Database(str(system.settings.database_url))) as database:
        _, key = Keys(database).create("acme")
    worker = system.start("echo")
    own_servers.redis.kill()
    wait_until(lambda: "Connection" in worker.log.read_text(), PATIENCE_SECONDS, "the worker misses Redis")
    own_servers.postgres.stop(immediate=True)
    wait_until(lambda: "Postgres did not answer" in worker.log.read_text(), PATIENCE_SECONDS, "and Postgres")
    own_servers.start()
    secrets = [own_servers.postgres.password, own_servers.redis.password, str(system.settings.secret), key]
    logs = [worker.log, *own_servers.folder.glob("*/log")]
    said = "".join(log.read_text(errors="replace") for log in logs)
    assert not [secret for secret in secrets if secret in said]


def test_every_line_of_a_workers_log_is_json(system: System) -> None:
    """From its start to its end, all three processes."""
    worker = system.start("echo")
    system.wait(system.producer.submit(model="echo", prompt="hello").id)
    worker.begin_stop()
    worker.wait()
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    assert {"supervisor", "consumer"} <= {line.get("process") for line in lines}
