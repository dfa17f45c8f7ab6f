"""`headrace doctor` and `headrace failed`: what they find, say and do, on real servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from headrace.commands.common import FAILURE, SUCCESS, Refused
from headrace.commands.health import doctor, failed
from headrace.doctor import Finding, examine
from jobs.failures import DeadLetters
from jobs.settings import Settings
from jobs.states import State
from kit.contract import Tables, Worker
from kit.databases import temporary_database
from producer.client import Producer

NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture
def producer(settings: Settings) -> Iterator[Producer]:
    """A producer of the test's own system, without a worker."""
    with Producer(settings) as producer:
        yield producer


@pytest.fixture
def worker(producer: Producer) -> Worker:
    """A live worker, which is moved by the test."""
    return Worker.hire(producer.database)


@pytest.fixture
def tables(settings: Settings) -> Iterator[Tables]:
    """The rows."""
    with closing(Tables(str(settings.database_url))) as tables:
        yield tables


@pytest.fixture
def connected(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands find these settings."""
    monkeypatch.setattr("headrace.commands.health.connected_settings", lambda: settings)


# == doctor ======================================================================================================


def test_all_is_well_with_a_worker(settings: Settings, worker: Worker, connected: None, capsys: Any) -> None:
    """Every finding says so, and none gives advice."""
    findings = examine(settings)
    assert {finding.about for finding in findings} >= {"Postgres", "Redis", "migrations", "clocks", "leases"}
    assert [finding for finding in findings if not finding.well or finding.advice] == []
    assert doctor() == SUCCESS
    assert "WRONG" not in capsys.readouterr().out


def test_jobs_that_nobody_serves_are_found(
    settings: Settings, producer: Producer, connected: None, capsys: Any
) -> None:
    """No worker, and a queue that waits for one: the advice is a command."""
    producer.submit(model="echo", prompt="x")
    assert "headrace worker --model echo" in _wrong(settings, "queue of echo").advice
    assert "headrace worker" in _wrong(settings, "workers").advice
    assert doctor() == FAILURE
    assert "headrace worker --model echo" in capsys.readouterr().out


def test_rows_under_a_dead_worker_are_found(
    settings: Settings, producer: Producer, worker: Worker, tables: Tables
) -> None:
    """It runs, its worker's lease ended long ago, and nobody swept."""
    worker.claim(producer.submit(model="echo", prompt="x").id)
    tables.execute("UPDATE workers SET lease_until = now() - interval '1 minute', state = 'dead'")
    assert _wrong(settings, "leases").says.startswith("1 rows run under nobody")
    assert any("1 died within an hour" in finding.says for finding in examine(settings))


def test_a_worker_that_is_not_ready_and_jobs_that_failed_are_found(
    settings: Settings, producer: Producer, worker: Worker, tables: Tables
) -> None:
    """Each with where to look."""
    worker.run(producer.submit(model="echo", prompt="x").id, "failed")
    tables.execute("UPDATE workers SET ready = 0")
    assert "not ready" in _wrong(settings, "worker of echo").says
    assert "headrace failed list" in _wrong(settings, "failed jobs").advice


def test_servers_that_are_away_are_findings(settings: Settings) -> None:
    """The other one is looked at all the same."""
    without_redis = settings.model_copy(update={"broker_url": NOBODY})
    assert "none is lost" in _wrong(without_redis, "Redis").advice
    without_postgres = settings.model_copy(update={"database_url": "postgresql+psycopg://x:x@127.0.0.1:1/x"})
    found = {finding.about: finding.well for finding in examine(without_postgres)}
    assert found == {"Postgres": False, "Redis": True}


def test_tables_that_were_never_made_are_found(settings: Settings, servers: Any) -> None:
    """The advice is `headrace migrate`, and nothing else is looked at."""
    with temporary_database(servers.database_url) as url:
        finding = _wrong(settings.model_copy(update={"database_url": url}), "migrations")
    assert finding.advice == "`headrace migrate`"


def test_a_clock_that_is_off_is_found(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much, and whose."""
    monkeypatch.setattr("jobs.overview.time.time", lambda: 0.0)
    assert "from Postgres" in _wrong(settings, "clocks").says


# == failed ======================================================================================================


def test_a_dead_letter_says_why_and_where(producer: Producer, worker: Worker) -> None:
    """Error, attempts and worker of the last attempt; only what failed is listed."""
    bad, good = (producer.submit(model="echo", prompt="x") for _ in range(2))
    worker.run(bad.id, "failed")
    worker.run(good.id)
    [letter] = DeadLetters(producer.database).list()
    assert (letter.id, letter.attempts, letter.worker_id, letter.host) == (bad.id, 1, worker.id, "here")
    assert (letter.code, letter.message) == ("engine_error", "it broke")


def test_a_retry_is_one_new_job(
    producer: Producer, worker: Worker, settings: Settings, connected: None, capsys: Any
) -> None:
    """It asks the same; asked for twice it is the same; the failed one stays as it was."""
    bad = producer.submit(model="echo", prompt="the same", max_tokens=7, metadata={"mine": "1"})
    worker.run(bad.id, "failed")
    before = producer.get(bad.id)
    for _ in range(2):
        assert failed("retry", [bad.id]) == SUCCESS
    assert capsys.readouterr().out.count(f"{bad.id} runs again as") == 2
    [again] = producer.list(states=[State.QUEUED])
    assert again.metadata == {"mine": "1", "retry_of": str(bad.id)}
    claim = worker.claim(again.id)
    assert (claim.request.prompt, claim.request.max_tokens) == ("the same", 7)
    assert producer.get(bad.id) == before


def test_a_purge_deletes_jobs_and_keeps_bills(
    producer: Producer, worker: Worker, tables: Tables, connected: None
) -> None:
    """Only failed ones, and no line that a batch still needs."""
    bad, good = (producer.submit(model="echo", prompt="x") for _ in range(2))
    [line] = producer.submit_many([{"model": "echo", "prompt": "x"}])
    worker.run(bad.id, "failed")
    worker.run(good.id)
    [claim] = worker.claim_bulk(1)
    worker.settle(claim, "failed")
    assert failed("purge", every=True, older_than_days=1.0) == SUCCESS
    assert tables.count("jobs") == 3
    assert failed("purge", every=True) == SUCCESS
    assert {job.id for job in producer.list()} == {good.id, line.id}
    assert tables.count("ledger") == 3


def test_nothing_is_retried_or_purged_unless_it_is_named(connected: None) -> None:
    """Ids, or --all."""
    for action in ("retry", "purge"):
        with pytest.raises(Refused, match="--all"):
            failed(action)  # type: ignore[arg-type]


def _wrong(settings: Settings, about: str) -> Finding:
    return next(finding for finding in examine(settings) if finding.about == about and not finding.well)
