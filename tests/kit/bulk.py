"""A bulk run's client as a process, which a test kills and starts again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from kit.invariants import BrokenPromise, check_output
from kit.systems import System
from kit.waiting import wait_until


def write_questions(path: Path, model: str, count: int) -> list[str]:
    """Questions for the model, one in fifty of which cannot be asked; each one's `custom_id`."""
    lines = [_line(model, number) for number in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [line["custom_id"] for line in lines]


def _line(model: str, number: int) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": f"{number:050d}"}]}
    if number % 50 == 0:
        body["max_tokens"] = 0
    return {"custom_id": f"line {number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def start_run(system: System, source: Path, output: Path) -> subprocess.Popen[bytes]:
    """`headrace run`, on the system's servers."""
    return subprocess.Popen(
        [sys.executable, "-m", "headrace", "run", str(source), "-o", str(output)],
        env=os.environ | system.settings.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


class BulkClient:
    """Has one file after the other answered, however often it is killed, and checks each: I4.

    Every method may raise BrokenPromise.
    """

    def __init__(self, system: System, folder: Path, model: str, lines: int) -> None:
        self.files = 0  # answered and checked
        self._system = system
        self._folder = folder
        self._source = folder / "in.jsonl"
        self._custom_ids = write_questions(self._source, model, lines)
        self._process = self._start()

    @classmethod
    @contextmanager
    def on(cls, system: System, folder: Path, model: str, lines: int) -> Iterator[Self]:
        """One at work; its process ends with the block."""
        client = cls(system, folder, model, lines)
        try:
            yield client
        finally:
            client._end()

    def kill(self) -> None:
        """SIGKILL, and the same command again; if it had put its output in place, the next file."""
        self._end()
        self.go_on()

    def go_on(self) -> None:
        """Start it again if it has ended: it gives up when Postgres is away for long."""
        if self._has_finished():
            self._check()
            self._process = self._start()

    def finish(self, patience_seconds: float) -> None:
        """Wait for the last output."""
        try:
            wait_until(self._has_finished, patience_seconds, "the last file is answered")
        except TimeoutError as error:
            raise BrokenPromise(f"I4 each line once: {error}") from error
        self._check()

    @property
    def _output(self) -> Path:
        return self._folder / f"out-{self.files}.jsonl"

    def _start(self) -> subprocess.Popen[bytes]:
        return start_run(self._system, self._source, self._output)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _has_finished(self) -> bool:
        if self._process.poll() is None:
            return False
        if not self._output.exists():
            self._process = self._start()
            return False
        return True

    def _check(self) -> None:
        output, self.files = self._output, self.files + 1
        check_output(output, output.with_suffix(".errors.jsonl"), self._custom_ids)
