"""The command `headrace` as a user runs it: a process of its own, on a home of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace import cli
from jobs.home import Home, Record
from kit.homes import temporary_home
from kit.waiting import wait_until

PATIENCE_SECONDS = 120.0
_OURS = ("HEADRACE_", "FLOWER_")


@dataclass(frozen=True)
class Done:
    """What one command came to."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Its output, which must be one JSON object and nothing else."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert self.out.count("\n") == 1
        return value


@dataclass(frozen=True)
class User:
    """Somebody with a home, in a folder, with these settings and no others."""

    home: Path
    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)

    def headrace(self, *arguments: str, stdin: str = "") -> Done:
        """Run a command to its end."""
        done = subprocess.run(
            _command(arguments),
            input=stdin,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self._environment(),
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def call(self, *arguments: str, stdin: str = "") -> Done:
        """The same in this process, which has loaded everything: much quicker."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(_OURS)]:
                patch.delenv(name)
            for name, value in self._own_environment().items():
                patch.setenv(name, value)
            patch.chdir(self.folder)
            patch.setattr("sys.stdin", io.StringIO(stdin))
            with redirect_stdout(out), redirect_stderr(err):
                status = cli.main(arguments)
        return Done(status, out.getvalue(), err.getvalue())

    @contextmanager
    def background(self, *arguments: str) -> Iterator[Background]:
        """Start a command; it is killed at the end if it still runs."""
        log = self.folder / f"{arguments[0]}.out"
        with log.open("wb") as output:
            process = subprocess.Popen(
                _command(arguments), stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, env=self._environment()
            )
        try:
            yield Background(process, log)
        finally:
            process.kill()
            process.wait()

    @contextmanager
    def up(self, *arguments: str) -> Iterator[Background]:
        """`headrace up` in the foreground, once it is up."""
        with self.background("up", *arguments) as command:
            command.await_until(lambda: self.record_of(command) is not None, "the stack is up")
            yield command

    def record_of(self, command: Background) -> Record | None:
        """`stack.json`, if this command wrote it."""
        record = Home(self.home).record()
        return record if record and record.pid == command.process.pid else None

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this home."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def program(self, name: str) -> psutil.Process:
        """The process whose command line has this word; waits for it if it is about to be started."""

        def find() -> psutil.Process | None:
            return next((one for one in self.processes() if name in _words(one)), None)

        return wait_until(find, PATIENCE_SECONDS, f"a process of {name}")

    def await_gone(self) -> None:
        """Wait until nothing runs for this home."""
        wait_until(lambda: not self.processes(), PATIENCE_SECONDS, "every process of the home has ended")

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        return inherited | self._own_environment()

    def _own_environment(self) -> dict[str, str]:
        return {"HEADRACE_HOME": str(self.home), "COLUMNS": "80"} | dict(self.settings)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and process.environ().get("HEADRACE_HOME") == str(self.home)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


@dataclass(frozen=True)
class Background:
    """A command that runs."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        """Everything it printed so far."""
        return self.log.read_text(encoding="utf-8")

    def await_until(self, holds: Any, what: str) -> None:
        """Wait for a condition while it runs."""

        def holds_now() -> bool:
            assert self.process.poll() is None, f"it ended with status {self.process.returncode}:\n{self.said}"
            return bool(holds())

        wait_until(holds_now, PATIENCE_SECONDS, what)

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> int:
        """Signal it and wait: its exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """SIGKILL, to it alone."""
        self.process.kill()
        self.process.wait()


@contextmanager
def user(**settings: str) -> Iterator[User]:
    """A user with a home that does not exist yet. Nothing of the home runs or lies about afterwards."""
    with temporary_home() as home:
        folder = home.parent / "folder"
        folder.mkdir()
        one = User(home, folder, settings)
        try:
            yield one
        finally:
            for process in one.processes():
                with suppress(psutil.NoSuchProcess):  # it has just ended by itself
                    process.kill()
            one.await_gone()


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-P", "-m", "headrace", *arguments]


def _words(process: psutil.Process) -> list[str]:
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:
        return []
    return [] if any(word.endswith("guard.py") for word in words) else words
