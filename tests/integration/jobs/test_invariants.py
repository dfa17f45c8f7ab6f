"""The checker of the promises finds each one that is broken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from jobs.store import Store
from kit.contract import Tables, Worker, accept
from kit.invariants import BrokenPromise, Witness, broken_promises, check_output


@pytest.fixture
def job(store: Store, worker: Worker) -> UUID:
    """A job that ran twice, and ended as it should."""
    job_id = accept(store)
    worker.run(job_id, "retried", busy_seconds=1.0)
    worker.run(job_id, busy_seconds=2.0)
    return job_id


def test_nothing_is_found_where_all_is_well(job: UUID, tables: Tables) -> None:
    """A retry, an end, one result, one bill over both attempts."""
    assert broken_promises(tables) == []


@pytest.mark.parametrize(
    ("harm", "broken"),
    [
        ("UPDATE attempts SET outcome = 'failed' WHERE outcome = 'succeeded'", "I1"),
        ("UPDATE attempts SET outcome = 'succeeded'", "I1"),
        ("DELETE FROM results", "I2"),
        ("DELETE FROM ledger", "I3"),
        ("UPDATE ledger SET state = 'failed'", "I3"),
        ("UPDATE ledger SET busy_seconds = 2.0", "I3"),
        ("UPDATE ledger SET completion_tokens = 9", "I3"),
        ("UPDATE attempts SET started_at = (SELECT min(started_at) FROM attempts)", "I5"),
        ("UPDATE attempts SET ended_at = NULL, outcome = NULL WHERE outcome = 'retried'", "I5"),
        ("UPDATE jobs SET attempts = 1", "I5"),
    ],
)
def test_a_broken_promise_is_found(job: UUID, tables: Tables, harm: str, broken: str) -> None:
    """Whatever row is made to lie, the checker names the promise and the job."""
    assert tables.execute(harm) > 0
    assert any(line.startswith(broken) and str(job) in line for line in broken_promises(tables))


def test_a_job_without_an_end_is_found(store: Store, tables: Tables) -> None:
    """It waits when all should have ended."""
    job_id = accept(store)
    assert broken_promises(tables) == [f"I1 ends exactly once: {job_id} is still queued"]


def test_an_output_with_a_line_too_many_or_too_few_is_found(tmp_path: Path) -> None:
    """Every custom_id is in output or errors, once."""
    output, errors = tmp_path / "output", tmp_path / "errors"
    output.write_text('{"custom_id": "a"}\n{"custom_id": "b"}\n')
    errors.write_text('{"custom_id": "c"}\n')
    check_output(output, errors, ["a", "b", "c"])
    for wanted in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(BrokenPromise, match="I4"):
            check_output(output, errors, wanted)


def test_what_a_witness_saw_is_held_against_what_is_there(job: UUID, tables: Tables, contract_url: str) -> None:
    """A job that was accepted and is gone, a result that changed after it was read, what ran unclaimed or twice."""
    tokens = [attempt["token"] for attempt in tables.attempts(job)]
    computed: list[UUID] = []
    with Witness(_system(tables, contract_url, computed)) as witness:
        lost, unclaimed = uuid4(), uuid4()
        witness.saw(*(SimpleNamespace(id=job_id) for job_id in (job, lost)))  # type: ignore[arg-type]
        computed += tokens
        assert witness.violations() == [f"I1 ends exactly once: {lost} was accepted and is lost"]

        tables.execute("UPDATE results SET usage = '{}'")
        tables.execute("UPDATE ledger SET completion_tokens = 0")
        computed += [tokens[0], unclaimed]
        with pytest.raises(BrokenPromise):
            witness.check()
        assert witness.violations() == [
            f"I1 ends exactly once: {lost} was accepted and is lost",
            f"I2 one result: that of {job} changed after it was read",
            f"I5 one attempt at a time: {unclaimed} was computed and never claimed",
            f"I5 one attempt at a time: {tokens[0]} was computed twice",
        ]


def _system(tables: Tables, url: str, computed: list[UUID]) -> Any:
    """One whose engine says that it computed these tokens."""
    worker = SimpleNamespace(executions=lambda: [SimpleNamespace(token=token) for token in computed])
    return SimpleNamespace(tables=tables, workers=[worker], settings=SimpleNamespace(database_url=url))
