"""How long a step may last: much longer than any before it, and never less than a machine under load may need."""

from __future__ import annotations

import pytest

from models.protocol import FIRST_STEPS, Health
from workers.watchdog import Watchdog


def word(steps: int, first_seconds: float = 0.0, later_seconds: float = 0.0) -> Health:
    """What an engine says after so many steps, whose longest took so long."""
    return Health(
        model="m",
        engine="echo",
        quantization="none",
        device="cpu",
        slots=4,
        context_tokens=100,
        running=1,
        waiting=0,
        steps=steps,
        busy_seconds=0.0,
        step_seconds=1.0,
        first_steps_seconds=first_seconds,
        later_steps_seconds=later_seconds,
        started_at=0.0,
        pid=1,
    )


def patience_seconds(*words: Health, fixed_seconds: float | None = None) -> float:
    """With the step after the last of these."""
    watchdog = Watchdog(fixed_seconds)
    for one in words:
        watchdog.learn(one)
    return watchdog.patience_seconds(words[-1])


@pytest.mark.parametrize("steps", [0, FIRST_STEPS - 1])
def test_the_first_steps_on_a_machine_have_time(steps: int) -> None:
    """Nobody knows yet how long this machine compiles."""
    assert patience_seconds(word(steps, first_seconds=0.1)) == 120.0


@pytest.mark.parametrize(
    ("longest_seconds", "patience"), [(0.01, 20.0), (5.0, 20.0), (10.0, 40.0), (30.0, 120.0), (500.0, 120.0)]
)
def test_a_later_step_is_held_against_those_before_it(longest_seconds: float, patience: float) -> None:
    """Four times the longest; at least 20 s, at most 120 s; the slow first ones do not count."""
    assert patience_seconds(word(FIRST_STEPS, 90.0, longest_seconds)) == patience


@pytest.mark.parametrize(("first_seconds", "patience"), [(0.1, 20.0), (12.0, 48.0), (90.0, 120.0)])
def test_the_next_engine_is_held_against_the_first_steps_of_the_one_before(
    first_seconds: float, patience: float
) -> None:
    """So one that hangs in its first step, under the same job, costs no two minutes each time."""
    assert patience_seconds(word(FIRST_STEPS, first_seconds, 0.1), word(0)) == patience


def test_an_engine_that_died_in_its_first_steps_teaches_nothing_of_them() -> None:
    """The longest may have been still to come."""
    assert patience_seconds(word(FIRST_STEPS - 1, 0.1), word(0)) == 120.0


def test_what_was_seen_once_is_remembered() -> None:
    """A quick engine after a slow one, on a machine that is slow at times."""
    assert patience_seconds(word(FIRST_STEPS, 1.0, 10.0), word(FIRST_STEPS, 1.0, 0.1)) == 40.0


@pytest.mark.parametrize("steps", [0, FIRST_STEPS])
def test_a_fixed_patience_is_the_same_with_every_step(steps: int) -> None:
    """Whoever sets HEADRACE_ENGINE_HANG_SECONDS knows better."""
    assert patience_seconds(word(steps, 90.0, 90.0), fixed_seconds=3.0) == 3.0
