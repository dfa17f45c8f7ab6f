"""The guard: a program ends when its owner does, and its end is told truly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from headrace import guard
from kit.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
SLEEP = ["sleep", "600"]
DEAF = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]
ANSWERS_INT = ["sh", "-c", "trap 'exit 42' INT; echo ready; while :; do sleep 0.05; done"]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change user")

OWNER = """
import sys
from headrace import guard
guarded = guard.start(["sleep", "600"], grace_seconds=60)
print(guarded.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """File for what a guarded program prints."""
    return tmp_path / "output"


@pytest.fixture
def sleeper() -> Iterator[guard.Guarded]:
    """A guarded program that would sleep for ten minutes."""
    guarded = guard.start(SLEEP)
    yield guarded
    guarded.stop()


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the guard as a program, with an owner that waits for it."""
    command = [sys.executable, "-m", "headrace.guard", *arguments]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        status = process.wait()
        assert process.stdout
        assert process.stderr
        return subprocess.CompletedProcess(command, status, process.stdout.read(), process.stderr.read())


def start_ready(command: list[str], output: Path, **options: object) -> guard.Guarded:
    """Start a program and wait until it says that it is ready."""
    with output.open("wb") as file:
        guarded = guard.start(command, output=file, **options)  # type: ignore[arg-type]
    wait_until(lambda: "ready" in output.read_text(), 20, "the program is ready")
    return guarded


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits to be buried."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL)])
def test_exits_with_the_status_of_the_program(script: str, status: int) -> None:
    """The guard ends as its program ends, and a signal n becomes 128 + n."""
    assert run_module("--", "sh", "-c", script).returncode == status


def test_the_command_may_hold_any_words() -> None:
    """What follows the first -- reaches the program untouched, options and further dashes too."""
    assert run_module("--grace", "1", "--", "echo", "--signal", "--", "two words").stdout == "--signal -- two words\n"


@pytest.mark.parametrize("arguments", [["echo"], ["--"], ["--signal", "NOPE", "--", "echo"]])
def test_refuses_a_bad_command_line(arguments: list[str]) -> None:
    """A command line without a command, or with an unknown signal, is refused with the usage."""
    refused = run_module(*arguments)
    assert refused.returncode == 2
    assert "usage:" in refused.stderr


def test_says_that_a_program_cannot_be_started(output: Path) -> None:
    """A program that does not exist is an error at start, and the output names it."""
    with output.open("wb") as file, pytest.raises(OSError, match="/no/such/program"):
        guard.start(["/no/such/program"], output=file)
    assert "guard: cannot start /no/such/program" in output.read_text()


def test_pid_is_that_of_the_program(sleeper: guard.Guarded) -> None:
    """The owner sees the program's own process id, not the guard's."""
    assert psutil.Process(sleeper.pid).cmdline() == SLEEP


@pytest.mark.parametrize("received", [signal.SIGTERM, signal.SIGINT])
def test_passes_signals_on_as_the_stop_signal(received: signal.Signals, output: Path) -> None:
    """SIGTERM and SIGINT reach the program as the signal it wants to be stopped by."""
    guarded = start_ready(ANSWERS_INT, output, stop_signal=signal.SIGINT)
    parent = psutil.Process(guarded.pid).parent()
    assert parent
    parent.send_signal(received)
    assert guarded.wait(20) == 42


def test_stop_ends_the_program_by_its_stop_signal(output: Path) -> None:
    """When the owner lets go, the program gets its stop signal and can end in its own way."""
    assert start_ready(ANSWERS_INT, output, stop_signal=signal.SIGINT).stop() == 42


def test_a_deaf_program_is_killed_after_the_grace(output: Path) -> None:
    """A program that ignores its stop signal gets SIGKILL."""
    assert start_ready(DEAF, output, grace_seconds=0.2).stop() == 128 + signal.SIGKILL


def test_an_ignored_interrupt_is_not_handed_on() -> None:
    """A program stops by SIGINT even if its owner was started as a background job, where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        guarded = guard.start(SLEEP, stop_signal=signal.SIGINT, grace_seconds=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert guarded.stop() == 128 + signal.SIGINT


def test_signals_after_the_end_do_nothing(sleeper: guard.Guarded) -> None:
    """Signalling or stopping a program that has ended touches no other process."""
    sleeper.signal(signal.SIGKILL)
    assert sleeper.wait(20) == 128 + signal.SIGKILL
    assert not sleeper.running
    sleeper.signal(signal.SIGKILL)
    assert sleeper.stop() == 128 + signal.SIGKILL


def test_program_ends_when_its_owner_is_killed() -> None:
    """SIGKILL of the owner alone ends what it had started."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        pid = int(owner.stdout.readline())
        assert not has_ended(pid)
        owner.kill()
    wait_until(lambda: has_ended(pid), 20, "the program has ended")


@on_linux
def test_program_ends_when_its_guard_is_killed(sleeper: guard.Guarded) -> None:
    """SIGKILL of the guard alone ends the program too."""
    _kill_guard_of(sleeper)
    wait_until(lambda: has_ended(sleeper.pid), 20, "the program has ended")


@on_linux
@as_root
def test_runs_as_another_user_and_still_ends_with_its_guard() -> None:
    """A program that gave up root has no group of root left, and the kernel still ends it with its guard."""
    guarded = guard.start(SLEEP, user="nobody")
    process = psutil.Process(guarded.pid)
    assert process.username() == "nobody"
    assert 0 not in process.gids()
    assert "Groups:\t \n" in Path(f"/proc/{guarded.pid}/status").read_text()
    _kill_guard_of(guarded)
    wait_until(lambda: has_ended(guarded.pid), 20, "the program has ended")
    guarded.stop()


def test_program_has_a_session_of_its_own(sleeper: guard.Guarded) -> None:
    """Ctrl-C in the owner's terminal reaches neither the program nor its guard."""
    guard_pid = psutil.Process(sleeper.pid).ppid()
    assert len({os.getsid(0), os.getsid(guard_pid), os.getsid(sleeper.pid)}) == 3


def test_needs_the_standard_library_alone() -> None:
    """The guard can be imported where no package is installed, so it starts at once."""
    code = f"import sys; sys.path.append({str(REPOSITORY)!r}); import headrace.guard"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def _kill_guard_of(guarded: guard.Guarded) -> None:
    parent = psutil.Process(guarded.pid).parent()
    assert parent
    parent.kill()
    assert guarded.wait(20) == -signal.SIGKILL
