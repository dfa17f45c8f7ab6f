"""The supervisor, with children of a few lines in place of engine and consumer."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.errors import SettingsError
from jobs.settings import Settings
from kit.waiting import wait_until
from models.catalog import Catalog
from workers import supervisor as module
from workers.supervisor import Child, Pulse, Supervisor, main, run

PATIENCE_SECONDS = 20.0
LIVES = "import sys; sys.stdin.read()"
DIES = "import sys; sys.exit(3)"
IGNORES_TERM = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); sys.stdin.read()"


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The supervisor's only clock."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def child() -> Iterator[Callable[[str], Child]]:
    """Makes a child from a line of Python; it is gone at the end."""
    made: list[Child] = []

    def make(code: str) -> Child:
        made.append(Child("child", _command(code), dict(os.environ)))
        return made[-1]

    yield make
    for one in made:
        one.kill()
        one.stop(PATIENCE_SECONDS)


# == one child ===================================================================================================


def test_a_child_is_started_once(child: Callable[[str], Child]) -> None:
    """`keep` starts what does not run, says so, and leaves alone what runs."""
    one = child(LIVES)
    assert one.keep() is True
    process = one.process
    assert one.keep() is False
    assert one.process is process


def test_the_pause_before_a_restart_doubles_up_to_a_limit(child: Callable[[str], Child], clock: Clock) -> None:
    """A child that dies young again and again is started after half a second, one, two, and so on up to thirty."""
    one = child(DIES)
    pauses = []
    for _ in range(9):
        assert one.keep() is True
        _await_death(one)
        assert one.keep() is False  # buried, and its pause begins
        pauses.append(one.due_at - clock.now)
        clock.now = one.due_at - 0.001
        assert one.keep() is False
        clock.now = one.due_at
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_a_death_of_old_age_begins_anew(child: Callable[[str], Child], clock: Clock) -> None:
    """A child that ran for long starts again soon, however often it died young before."""
    one = child(DIES)
    one.young_deaths = 7
    one.keep()
    _await_death(one)
    clock.now += 61.0
    one.keep()
    assert one.due_at - clock.now == 0.5


def test_stopping_ends_a_child_gently(child: Callable[[str], Child]) -> None:
    """SIGTERM is enough for one that listens."""
    one = child(LIVES)
    one.keep()
    process = one.process
    one.stop(PATIENCE_SECONDS)
    assert process is not None
    assert process.returncode == -15
    assert one.process is None


def test_a_child_that_does_not_listen_is_killed(
    child: Callable[[str], Child], capfd: pytest.CaptureFixture[str]
) -> None:
    """When patience ends, SIGKILL."""
    one = child(IGNORES_TERM)
    one.keep()
    process = one.process
    wait_until(lambda: capfd.readouterr().out, PATIENCE_SECONDS, "the child ignores SIGTERM")
    one.stop(0.01)
    assert process is not None
    assert process.returncode == -9


def test_stopping_what_does_not_run_is_nothing(child: Callable[[str], Child]) -> None:
    """Neither stop nor kill mind that there is no process."""
    one = child(LIVES)
    one.stop(PATIENCE_SECONDS)
    one.kill()
    assert one.process is None


def test_a_child_sees_the_end_of_its_supervisor(child: Callable[[str], Child]) -> None:
    """Its standard input is a pipe that nobody else holds: when it closes, the child can end by itself."""
    one, other = child(LIVES), child(LIVES)
    one.keep()
    other.keep()  # started later: it must not have inherited the first one's pipe
    process = one.process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(PATIENCE_SECONDS) == 0


# == the pulse ===================================================================================================


def test_a_consumer_that_beats_is_not_silent(tmp_path: Path, clock: Clock) -> None:
    """Every change of the file's time is a beat; without one for too long it is silent, with the next it is not."""
    pulse = Pulse(tmp_path / "alive", 10.0)
    for beat in range(5):
        _touch(pulse.path, beat)
        assert not pulse.silent()
        clock.now += 9.0
    assert not pulse.silent()
    clock.now += 2.0
    assert pulse.silent()
    _touch(pulse.path, 99)
    assert not pulse.silent()


def test_a_consumer_that_never_beat_is_still_starting(tmp_path: Path, clock: Clock) -> None:
    """It may wait for its engine for as long as that takes to load; silence counts from the first beat."""
    pulse = Pulse(tmp_path / "alive", 10.0)
    clock.now += 10_000.0
    assert not pulse.silent()
    _touch(pulse.path, 1)
    clock.now += 10.0
    assert not pulse.silent()


def test_the_next_consumer_does_not_inherit_a_silence(tmp_path: Path, clock: Clock) -> None:
    """After `forget` the beats of the one before count for nothing."""
    pulse = Pulse(tmp_path / "alive", 10.0)
    _touch(pulse.path, 1)
    assert not pulse.silent()
    clock.now += 11.0
    assert pulse.silent()
    pulse.forget()
    assert not pulse.path.exists()
    clock.now += 11.0
    assert not pulse.silent()
    pulse.forget()


# == both children ===============================================================================================


class Run:
    """A supervisor at work in a thread, with the children given, on a clock that runs twenty times as fast."""

    def __init__(self, supervisor: Supervisor, engine: str, consumer: str) -> None:
        self.supervisor = supervisor
        supervisor.engine.command = _command(engine, supervisor._socket)
        supervisor.consumer.command = _command(consumer, supervisor._pulse.path)
        self.status: list[int] = []
        self.thread = threading.Thread(target=lambda: self.status.append(supervisor.run()), daemon=True)

    def end(self) -> int:
        self.supervisor.stop()
        self.thread.join(PATIENCE_SECONDS)
        assert not self.thread.is_alive()
        return self.status[0]


COMES_UP = "import sys; open(sys.argv[1], 'w').close(); sys.stdin.read()"
BEATS = """
import os, sys, time
while True:
    open(sys.argv[1], "a").close()
    os.utime(sys.argv[1])
    time.sleep(0.005)
"""
BEATS_ONCE = COMES_UP


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Run]]:
    """Starts a supervisor over an engine and a consumer of a few lines."""
    real = time.monotonic
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 20.0 * real()))
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    runs: list[Run] = []

    def start(engine: str, consumer: str) -> Run:
        spec = Catalog.from_mapping().get("echo")
        runs.append(Run(Supervisor(_settings(), spec, None, tmp_path), engine, consumer))
        runs[-1].thread.start()
        return runs[-1]

    yield start
    for one in runs:
        one.end()


def test_both_are_started_and_stopped(started: Callable[[str, str], Run]) -> None:
    """A supervisor that is told to stop ends both of its children and has status 0."""
    one = started(COMES_UP, BEATS)
    engine, consumer = _pid(one.supervisor.engine), _pid(one.supervisor.consumer)
    assert one.end() == 0
    assert not _exists(engine)
    assert not _exists(consumer)


def test_each_is_restarted_without_the_other(started: Callable[[str, str], Run]) -> None:
    """The death of the one leaves the other running."""
    one = started(COMES_UP, BEATS)
    engine, consumer = _pid(one.supervisor.engine), _pid(one.supervisor.consumer)
    os.kill(consumer, 9)
    _await_another(one.supervisor.consumer, consumer)
    assert _pid(one.supervisor.engine) == engine

    consumer = _pid(one.supervisor.consumer)
    os.kill(engine, 9)
    _await_another(one.supervisor.engine, engine)
    assert _pid(one.supervisor.consumer) == consumer


def test_a_silent_consumer_is_killed_and_the_engine_keeps_its_model(started: Callable[[str, str], Run]) -> None:
    """One that beat and stopped is started again; the engine is not touched."""
    one = started(COMES_UP, BEATS_ONCE)
    engine, consumer = _pid(one.supervisor.engine), _pid(one.supervisor.consumer)
    _await_another(one.supervisor.consumer, consumer)
    assert _pid(one.supervisor.engine) == engine


def test_an_engine_that_never_comes_up_is_given_up(started: Callable[[str, str], Run]) -> None:
    """A model that cannot be loaded is tried a few times; then the supervisor ends with status 1, and so do both."""
    one = started(DIES, BEATS)
    one.thread.join(PATIENCE_SECONDS)
    assert one.status == [1]
    assert one.supervisor.engine.young_deaths == 3
    assert one.supervisor.consumer.process is None


def test_an_engine_that_came_up_once_is_started_for_ever(started: Callable[[str, str], Run]) -> None:
    """After a first success deaths are taken for passing ones, however many, and pauses do not grow."""
    one = started("import sys; open(sys.argv[1], 'w').close(); sys.exit(1)", BEATS)
    lives: set[int] = set()

    def five() -> bool:
        process = one.supervisor.engine.process
        lives.update([] if process is None else [process.pid])
        return len(lives) >= 5

    wait_until(five, PATIENCE_SECONDS, "five lives")
    assert one.supervisor.engine.young_deaths <= 1
    assert one.thread.is_alive()


# == what children get ===========================================================================================


@pytest.mark.parametrize("gpus", [None, "0,1"])
def test_only_the_engine_sees_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str | None) -> None:
    """The engine gets the devices asked for, or all there are; the consumer none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    one = Supervisor(_settings(), Catalog.from_mapping().get("echo"), gpus, tmp_path)
    assert one.engine.environment["CUDA_VISIBLE_DEVICES"] == (gpus or "7")
    assert one.consumer.environment["CUDA_VISIBLE_DEVICES"] == ""


def test_children_get_the_settings_and_the_same_spec(tmp_path: Path) -> None:
    """Both are told the spec that the supervisor decided on; servers are the consumer's affair, by environment."""
    spec = Catalog.from_mapping({"echo": {"slots": 3}}).get("echo")
    one = Supervisor(_settings(), spec, None, tmp_path, execution_log=tmp_path / "executions")
    for command in (one.engine.command, one.consumer.command):
        assert spec.model_dump_json() in command
        assert not any("secret" in part for part in command)
    assert one.consumer.environment["HEADRACE_DATABASE_URL"] == "postgresql+psycopg://me:secret@nowhere/x"
    assert one.engine.command[-2:] == ["--execution-log", str(tmp_path / "executions")]


def test_a_worker_needs_servers_and_a_known_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both mistakes are named before any process starts, and end with status 2."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(SettingsError, match="HEADRACE_DATABASE_URL"):
        run("echo", None)
    monkeypatch.setenv("HEADRACE_DATABASE_URL", "postgresql://nowhere/x")
    monkeypatch.setenv("HEADRACE_BROKER_URL", "redis://nowhere/0")
    monkeypatch.setenv("HEADRACE_SECRET", "s" * 32)
    with pytest.raises(SettingsError, match="no-such-model"):
        run("no-such-model", None)
    monkeypatch.setattr(module, "set_up_logging", lambda _: None)  # that of this process is pytest's
    assert main(["--model", "no-such-model"]) == 2


# == helpers =====================================================================================================


def _settings() -> Settings:
    urls = {"database_url": "postgresql://me:secret@nowhere/x", "broker_url": "redis://nowhere/0", "secret": "s" * 32}
    return Settings.load(**urls, drain_seconds=5.0, lease_seconds=10.0)


def _command(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]


def _await_death(child: Child) -> None:
    assert child.process is not None
    child.process.wait(PATIENCE_SECONDS)


def _touch(path: Path, beat: int) -> None:
    path.touch()
    os.utime(path, (beat, beat))


def _pid(child: Child) -> int:
    return wait_until(lambda: child.process, PATIENCE_SECONDS, "the child is started").pid


def _await_another(child: Child, pid: int) -> None:
    wait_until(lambda: child.process and child.process.pid != pid, PATIENCE_SECONDS, "the child is started again")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
