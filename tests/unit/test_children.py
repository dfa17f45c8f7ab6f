"""Children of a stack: started again when they end, given up when that does not help."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from headrace.children import RESTART_PAUSES_SECONDS, STEADY_SECONDS, Keeper, Program, await_answer, stop_all
from jobs.home import StackError
from kit.waiting import wait_until


@dataclass
class Fake:
    """A child that runs when told to."""

    name: str = "worker"
    running: bool = True
    starts: int = 0

    def start(self) -> None:
        self.running = True
        self.starts += 1

    def stop(self) -> None:
        self.running = False

    def last_words(self) -> str:
        return " Its log ends: bye"


@dataclass
class Scene:
    """A keeper with a clock that the test turns."""

    child: Fake = field(default_factory=Fake)
    now: float = 1000.0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keeper = Keeper(self.child, self.notes.append, lambda: self.now)

    def fall_and_wait(self, seconds: float) -> None:
        self.child.running = False
        self.keeper.check()
        self.now += seconds
        self.keeper.check()


def test_a_child_that_runs_is_left_alone() -> None:
    """Nothing is started and nothing is said while all is well."""
    scene = Scene()
    scene.keeper.check()
    assert (scene.child.starts, scene.notes) == (0, [])


def test_a_child_that_ended_is_started_again_after_a_pause() -> None:
    """Not at once, but after the pause that was announced with its last words."""
    scene = Scene()
    scene.fall_and_wait(RESTART_PAUSES_SECONDS[0] / 2)
    assert scene.child.starts == 0
    scene.now += RESTART_PAUSES_SECONDS[0]
    scene.keeper.check()
    assert scene.child.starts == 1
    assert scene.notes == ["worker ended; starting it again in 1 s. Its log ends: bye"]


def test_a_child_that_keeps_ending_is_given_up() -> None:
    """After the last pause there is no further try; the error has the child's last words."""
    scene = Scene()
    for pause in RESTART_PAUSES_SECONDS:
        scene.fall_and_wait(pause)
    with pytest.raises(StackError, match=r"worker ended 4 times in a row\. Its log ends: bye"):
        scene.fall_and_wait(0)
    assert scene.child.starts == len(RESTART_PAUSES_SECONDS)


def test_falls_long_ago_are_forgiven() -> None:
    """A child that ran steadily in between has all its tries again."""
    scene = Scene()
    for _ in range(2 * len(RESTART_PAUSES_SECONDS)):
        scene.fall_and_wait(RESTART_PAUSES_SECONDS[0])
        scene.now += STEADY_SECONDS + 1
    assert scene.child.starts == 2 * len(RESTART_PAUSES_SECONDS)


def test_children_are_stopped_side_by_side() -> None:
    """All of them are stopped; no child, nothing to do."""
    children = [Fake() for _ in range(3)]
    stop_all(children)
    assert not any(child.running for child in children)
    stop_all([])


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A Python module that says hello and what it was given, then waits."""
    (tmp_path / "speaker.py").write_text(
        "import os, sys, time\n"
        "print('hello', sys.argv[1], os.environ['GIVEN'], flush=True)\n"
        "time.sleep(float(sys.argv[2]))\n"
    )
    environment = {"GIVEN": "secret", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    return Program(
        "speaker", ["speaker", "you", "60"], environment=environment, log=tmp_path / "speaker.log", grace_seconds=5
    )


def test_a_program_runs_with_its_environment_and_a_private_log(program: Program) -> None:
    """Arguments and variables reach it, what it prints is in its log, and stop ends it."""
    program.start()
    wait_until(lambda: b"hello you secret" in program.log.read_bytes(), 30, "the program speaks")
    assert program.running
    assert program.log.stat().st_mode & 0o777 == 0o600
    program.stop()
    assert not program.running


def test_waiting_for_a_program_that_ends_shows_its_last_words(program: Program) -> None:
    """An end while starting is told with the log since that start, not with what was there before."""
    program.log.write_text("an earlier life\n")
    program._arguments = ["speaker", "you", "0"]
    program.start()
    with pytest.raises(StackError, match=r"(?s)speaker ended while starting.*hello you secret") as caught:
        await_answer(program, lambda: False, 60)
    assert "an earlier life" not in str(caught.value)


def test_last_words_are_for_people(program: Program) -> None:
    """Of our JSON lines only the level and message of what went wrong; other lines as they are; not too many."""
    entries = [{"level": "info", "message": "engine started"}, {"level": "error", "message": "no weights"}]
    lines = ["plain"] * 50 + [json.dumps(entry) for entry in entries] + ['{"unfinished": ', "7"]
    program.log.write_text("\n".join(lines))
    words = program.last_words().splitlines()
    assert words[0] == f" Its log, {program.log}, ends:"
    assert [word.strip() for word in words[-4:]] == ["plain", "error: no weights", '{"unfinished":', "7"]
    assert len(words) == 11


def test_waiting_for_a_program_has_an_end(program: Program) -> None:
    """A program that runs and never answers is an error that says how long was waited."""
    program.start()
    with pytest.raises(StackError, match="did not answer within 0 s"):
        await_answer(program, lambda: False, 0)
    program.stop()
