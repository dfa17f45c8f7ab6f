"""The life of one embedded server: folder, port, start, proof of life, end, and what a killed owner left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, NamedTuple

from headrace import guard
from headrace.places import Place, ServerError, make_folder

_POLL_SECONDS = 0.02
_SLOWEST_POLL_SECONDS = 0.25  # a long recovery logs every knock at the door
_GRACE_SECONDS = 30.0  # a clean shutdown of Postgres writes a checkpoint first
_PATIENCE_SECONDS = 5.0  # with a leftover process, before SIGKILL
_PORT_ATTEMPTS = 5
_LOG_LINES = 20
# Below the range from which kernels take ports for outgoing connections (32768 and up). There, a client that reconnects
# to a server that is down for a moment can be given the server's own port, and so keep it from coming back.
_FIRST_PORT, _PORTS = 20_000, 10_000


class PortTakenError(ServerError):
    """Another program holds the port."""


class Server(ABC):
    """One server of a home. It keeps its port from its first start on, and its password and data with the home."""

    name: ClassVar[str]
    program: ClassVar[str]  # the kernel's name of the process
    stop_signal: ClassVar[signal.Signals]
    immediate_signal: ClassVar[signal.Signals]

    def __init__(self, place: Place, start_seconds: float) -> None:
        self.folder = place.folder / self.name.lower()
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        self._place = place
        self._start_seconds = start_seconds
        self._port: int | None = None
        self._process: guard.Guarded | None = None

    @property
    def pid(self) -> int:
        """The server's own process id. Raises ServerError if it does not run."""
        if self._process is None or not self._process.running:
            raise ServerError(f"{self.name} is not running")
        return self._process.pid

    @property
    def port(self) -> int:
        """Its port on 127.0.0.1. Raises ServerError before the first start."""
        if self._port is None:
            raise ServerError(f"{self.name} has no port before its first start")
        return self._port

    @property
    def password(self) -> str:
        """Made once for a home and kept beside the data, mode 0600."""
        return (self.folder / "password").read_text(encoding="ascii")

    @property
    @abstractmethod
    def url(self) -> str:
        """Address and password in one. Raises ServerError before the first start."""

    def start(self) -> None:
        """Start it and wait until it answers; a running one is left as it is. Raises ServerError."""
        if self._process is not None and self._process.running:
            return
        self._place.create()
        self._end_leftovers()
        self._create_folder()
        if self._port is None:
            self._start_on_free_port()
        else:
            self._start_on(self._port)

    def stop(self, *, immediate: bool = False) -> None:
        """End it and wait: by a clean shutdown, or `immediate`, which Postgres recovers from at its next start."""
        if self._process is not None:
            if immediate:
                self._process.signal(self.immediate_signal)
            self._process.stop()

    def kill(self) -> None:
        """End it by SIGKILL, as a crash would, and wait until none of its processes is left."""
        if self._process is not None:
            self._process.signal(signal.SIGKILL)
            self._process.stop()
            self._end_leftovers()

    def is_alive(self) -> bool:
        """Whether it answers to our password within a few seconds."""
        return self._port is not None and self._answers(self._port)

    def _create_folder(self) -> None:
        make_folder(self.folder, self._fill)
        for abandoned in self._place.folder.glob(f"{self.folder.name}.new-*"):
            shutil.rmtree(abandoned, ignore_errors=True)

    def _fill(self, folder: Path) -> None:
        """Put into a new folder what belongs to it; it is renamed when this returns."""
        self._place.share(folder)
        (folder / "data").mkdir(mode=0o700)
        self._place.give(folder / "data")
        self._place.write(folder / "password", secrets.token_hex(24))

    def _start_on_free_port(self) -> None:
        for _ in range(_PORT_ATTEMPTS - 1):
            with contextlib.suppress(PortTakenError):  # by another program, just after we had looked
                return self._start_on(_free_port())
        return self._start_on(_free_port())

    def _start_on(self, port: int) -> None:
        log_start = self.log.stat().st_size if self.log.exists() else 0
        self._process = self._launch(self._command(port), self.folder)
        try:
            self._await_answer(self._process, port, log_start)
            self._once_up(port)
        except BaseException:
            self._process.stop()
            raise
        self._port = port

    def _launch(self, command: list[str], folder: Path) -> guard.Guarded:
        with (folder / "log").open("ab") as log:
            return guard.start(
                command,
                stop_signal=self.stop_signal,
                grace_seconds=_GRACE_SECONDS,
                user=self._place.account,
                cwd=folder / "data",
                output=log,
            )

    def _await_answer(self, process: guard.Guarded, port: int, log_start: int) -> None:
        deadline = time.monotonic() + self._start_seconds
        pause_seconds = _POLL_SECONDS
        while not self._answers(port):
            if not process.running:
                reason = ServerError if _is_free(port) else PortTakenError
                raise reason(f"{self.name} ended while starting on port {port}.{last_words(self.log, log_start)}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer within {self._start_seconds:g} s.{last_words(self.log, log_start)}",
                )
            time.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * 1.5, _SLOWEST_POLL_SECONDS)

    def _end_leftovers(self) -> None:
        """End what a killed owner left running on these data; a guard that still lives does so itself, given time.

        Without /proc nothing is found, and it is left to Postgres to refuse a start beside another.
        """
        start = time.monotonic()
        while leftovers := self._leftovers():
            waited = time.monotonic() - start
            if waited > self._start_seconds:
                raise ServerError(f"{self.folder} is in use by another process, pid {leftovers[0].pid}")
            if not any(process.guarded for process in leftovers):
                _signal_all(leftovers, self.immediate_signal if waited < _PATIENCE_SECONDS else signal.SIGKILL)
            time.sleep(_POLL_SECONDS)

    def _leftovers(self) -> list[_Process]:
        running = [process for process in _processes_naming(self._mark()) if process.program == self.program]
        unfinished = _processes_naming(f"{self.folder}.new-")
        return running + [process for process in unfinished if process.program == "initdb"]

    @abstractmethod
    def _mark(self) -> str:
        """A text in the command line of every process of this server, and of no other server."""

    @abstractmethod
    def _command(self, port: int) -> list[str]:
        """The command line, without any password. Writes the files it names."""

    @abstractmethod
    def _answers(self, port: int) -> bool:
        """Whether a server that knows our password answers there."""

    @abstractmethod
    def _once_up(self, port: int) -> None:
        """What is left to do in a server that has just come up."""


def has_proc() -> bool:
    """Whether processes can be looked up in /proc (Linux)."""
    return Path("/proc/self/stat").exists()


def last_words(log: Path, start: int = 0) -> str:
    """The end of a server's log as part of an error message; `start` is where its latest run begins, in bytes."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join([f" Its log, {log}, ends:", *lines[-_LOG_LINES:]])


class _Process(NamedTuple):
    pid: int
    program: str
    guarded: bool


def _processes_naming(mark: str) -> Iterable[_Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.fsencode(mark) in (folder / "cmdline").read_bytes():
                program, parent = _program_and_parent(folder)
                yield _Process(int(folder.name), program, guarded=_is_guard(parent))


def _program_and_parent(folder: Path) -> tuple[str, Path]:
    # "PID (PROGRAM) STATE PARENT ...", where PROGRAM may hold anything
    head, _, tail = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
    return head.partition("(")[2], folder.parent / tail.split()[1]


def _is_guard(process: Path) -> bool:
    try:
        return os.fsencode(guard.__file__) in (process / "cmdline").read_bytes()
    except OSError:
        return False


def _signal_all(processes: Iterable[_Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)


def _free_port() -> int:
    while True:
        port = _FIRST_PORT + secrets.randbelow(_PORTS)
        if _is_free(port):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
