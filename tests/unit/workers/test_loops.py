"""The shape of every background loop: it turns, it outlives errors, it stops."""

from __future__ import annotations

import logging
import threading

import pytest

from jobs.errors import StoreUnavailable
from workers.loops import Loop

PATIENCE_SECONDS = 10.0


class Turns:
    """Counts its calls; the first ones raise what they are given."""

    def __init__(self, *errors: Exception, wanted: int = 1) -> None:
        self.done = 0
        self.enough = threading.Event()
        self._errors = list(errors)
        self._wanted = wanted

    def __call__(self) -> None:
        self.done += 1
        if self.done >= self._wanted:
            self.enough.set()
        if self._errors:
            raise self._errors.pop(0)


def test_the_first_turn_comes_at_once() -> None:
    """A loop with a long period makes its first turn when it starts, not a period later."""
    turns = Turns()
    loop = Loop("slow", 3600.0, turns)
    loop.start()
    assert turns.enough.wait(PATIENCE_SECONDS)
    loop.stop()
    assert turns.done == 1


def test_a_loop_goes_on_after_errors(caplog: pytest.LogCaptureFixture) -> None:
    """An outage of Postgres costs a turn and a line; anything else a turn and its traceback."""
    turns = Turns(StoreUnavailable("gone"), ZeroDivisionError("oh"), wanted=4)
    loop = Loop("sweeper", 0.001, turns)
    with caplog.at_level(logging.WARNING):
        loop.start()
        assert turns.enough.wait(PATIENCE_SECONDS)
        loop.stop()
    assert [(record.levelname, bool(record.exc_info)) for record in caplog.records] == [
        ("WARNING", False),
        ("ERROR", True),
    ]
    assert "sweeper" in caplog.text


def test_no_turn_comes_after_stop() -> None:
    """Stopping waits for the turn in progress, and there is none after it."""
    began, go_on = threading.Event(), threading.Event()
    turns = 0

    def turn() -> None:
        nonlocal turns
        began.set()
        assert go_on.wait(PATIENCE_SECONDS)
        turns += 1

    loop = Loop("loop", 0.0, turn)
    loop.start()
    assert began.wait(PATIENCE_SECONDS)
    stopping = threading.Thread(target=loop.stop)
    stopping.start()
    assert turns == 0
    go_on.set()
    stopping.join(PATIENCE_SECONDS)
    assert not stopping.is_alive()
    finished = turns
    assert finished >= 1
    assert loop._thread is not None
    assert not loop._thread.is_alive()


def test_a_loop_can_stop_itself() -> None:
    """A turn that stops its own loop does not wait for itself."""
    turns = Turns()

    def stop_after_one() -> None:
        turns()
        loop.stop()

    loop = Loop("loop", 0.0, stop_after_one)
    loop.start()
    assert turns.enough.wait(PATIENCE_SECONDS)
    assert loop._thread is not None
    loop._thread.join(PATIENCE_SECONDS)
    assert not loop._thread.is_alive()
    assert turns.done == 1


def test_a_loop_that_never_started_can_be_stopped() -> None:
    """Whoever cleans up need not know how far the start came."""
    loop = Loop("loop", 1.0, lambda: None)
    loop.stop()
    assert loop._thread is None
