"""The states, and that everything else agrees on them."""

from __future__ import annotations

import pytest
from sqlalchemy import CheckConstraint, Table

from jobs import states, tables
from jobs.states import FINAL, AttemptOutcome, BatchState, Lane, State, WorkerState


@pytest.mark.parametrize("state", State)
def test_final(state: State) -> None:
    """Four states are final, and each knows it."""
    assert state.final == (state in {"succeeded", "failed", "cancelled", "expired"})
    assert (state in FINAL) == state.final


def test_every_final_state_can_end_an_attempt() -> None:
    """A settlement's outcome becomes the job's state, so each final state is an outcome; three others end no job."""
    outcomes = {str(outcome) for outcome in AttemptOutcome}
    assert outcomes - {str(state) for state in FINAL} == {"retried", "released", "lost"}
    assert outcomes >= {str(state) for state in FINAL}


@pytest.mark.parametrize("state", State)
def test_the_diagram_shows_every_state(state: State) -> None:
    """Whoever reads the module finds each state in its diagram."""
    assert state in str(states.__doc__)


@pytest.mark.parametrize(
    ("table", "constraint", "words"),
    [
        (tables.jobs, "jobs_state_known", State),
        (tables.jobs, "jobs_lane_known", Lane),
        (tables.jobs, "jobs_finished_when_final", FINAL),
        (tables.ledger, "ledger_final", FINAL),
        (tables.attempts, "attempts_outcome_known", AttemptOutcome),
        (tables.workers, "workers_state_known", WorkerState),
        (tables.batches, "batches_state_known", BatchState),
    ],
)
def test_tables_know_the_same_words(table: Table, constraint: str, words: type[State]) -> None:
    """Each table takes the words of its enum and no other."""
    checks = {str(check.name): str(check.sqltext) for check in table.constraints if isinstance(check, CheckConstraint)}
    listed = checks[constraint].partition(" IN (")[2].rstrip(")").split(", ")
    assert sorted(word.strip("'") for word in listed) == sorted(words)
