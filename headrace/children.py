"""The programs of a stack: each under guard, with a log, started again when it ends until that does not help."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from headrace import guard
from headrace.server_life import Server, last_words
from headrace.servers import ServerError
from jobs.home import StackError

RESTART_PAUSES_SECONDS = (1.0, 2.0, 4.0)
# A program that ran this long had started well: earlier falls no longer count.
STEADY_SECONDS = 60.0
_POLL_SECONDS = 0.1
_LAST_LINES = 10


class Child(Protocol):
    """A program that a stack keeps running."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""

    def start(self) -> None:
        """Start it (again)."""

    def stop(self) -> None:
        """End it cleanly and wait."""

    def last_words(self) -> str:
        """The end of its log, as part of an error message."""


class Program:
    """One of our Python modules as a child: `python -m MODULE ARGUMENTS`, in the environment given.

    `grace_seconds` is how long it may take to stop before it is killed.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        environment: dict[str, str],
        log: Path,
        grace_seconds: float,
    ) -> None:
        self.name = name
        self.log = log
        self._arguments = arguments
        self._environment = os.environ | environment
        self._grace_seconds = grace_seconds
        self._log_start = 0
        self._process: guard.Guarded | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.running

    def start(self) -> None:
        """Start it under guard; what it prints goes to its log."""
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            self._process = guard.start(
                [sys.executable, "-m", *self._arguments],
                env=self._environment,
                output=log,
                grace_seconds=self._grace_seconds,
            )

    def stop(self) -> None:
        """End it: SIGTERM, after the grace SIGKILL. Waits."""
        if self._process is not None:
            self._process.stop()

    def last_words(self) -> str:
        """The end of what it printed since its latest start, without what only informs."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        said = [text for line in lines if (text := _plainly(line))]
        return "\n  ".join([f" Its log, {self.log}, ends:", *said[-_LAST_LINES:]])


class ServerChild:
    """An embedded server as a child."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.name = server.name

    @property
    def running(self) -> bool:
        """Whether its process has not ended."""
        try:
            return self._server.pid > 0
        except ServerError:
            return False

    def start(self) -> None:
        """Start it where it was, and wait until it answers. Raises ServerError."""
        self._server.start()

    def stop(self) -> None:
        """A clean shutdown."""
        self._server.stop()

    def last_words(self) -> str:
        """The end of its log."""
        return last_words(self._server.log)


class Keeper:
    """Keeps one child running: call `check` a few times a second."""

    def __init__(self, child: Child, note: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.child = child
        self._note = note
        self._clock = clock
        self._falls = 0
        self._started = clock()
        self._due: float | None = None

    def check(self) -> None:
        """Start the child again if it ended, after a pause. Raises StackError once that has not helped."""
        now = self._clock()
        if self._due is not None:
            if now >= self._due:
                self._start()
        elif not self.child.running:
            self._plan(now)

    def _start(self) -> None:
        self._due = None
        self.child.start()
        self._started = self._clock()

    def _plan(self, now: float) -> None:
        self._falls = 0 if now - self._started > STEADY_SECONDS else self._falls
        if self._falls == len(RESTART_PAUSES_SECONDS):
            raise StackError(f"{self.child.name} ended {self._falls + 1} times in a row.{self.child.last_words()}")
        pause_seconds = RESTART_PAUSES_SECONDS[self._falls]
        self._falls += 1
        self._due = now + pause_seconds
        self._note(f"{self.child.name} ended; starting it again in {pause_seconds:g} s.{self.child.last_words()}")


def _plainly(line: str) -> str:
    """A line of a log for people. Ours are JSON; those that only inform become empty."""
    try:
        entry = json.loads(line)
        return "" if entry["level"] == "info" else f"{entry['level']}: {entry['message']}"
    except (ValueError, TypeError, KeyError):
        return line


def stop_all(children: Sequence[Child]) -> None:
    """Stop children side by side and wait for all of them."""
    if children:
        with ThreadPoolExecutor(len(children)) as threads:
            list(threads.map(lambda child: child.stop(), children))


def await_answer(program: Program, answers: Callable[[], bool], patience_seconds: float) -> None:
    """Wait until it answers. Raises StackError if it ends before, or takes longer."""
    deadline = time.monotonic() + patience_seconds
    while not answers():
        if not program.running:
            raise StackError(f"{program.name} ended while starting.{program.last_words()}")
        if time.monotonic() > deadline:
            raise StackError(f"{program.name} did not answer within {patience_seconds:g} s.{program.last_words()}")
        time.sleep(_POLL_SECONDS)
