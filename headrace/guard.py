"""Ties a program to the life of the process that started it.

    python -m headrace.guard [--signal NAME] [--grace SECONDS] [--user NAME] [--pid-fd N] -- CMD...

A guard starts CMD, passes SIGTERM and SIGINT on to it as the signal NAME, and exits with its status (128 + n for a
signal n). Its standard input is the owner's proof of life: when that reaches its end the owner has let go or died,
however suddenly, and CMD is ended (NAME, then SIGKILL after the grace). If the guard itself is killed, the kernel sends
NAME to CMD (Linux). Ctrl-C in a terminal does not reach CMD: it has a session of its own.

The program uses the standard library alone and starts in a few hundredths of a second. `start` is the owner's side.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import pwd
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_NOT_STARTED = 127  # what a shell answers for a command it cannot start


class Guarded:
    """A program under guard, as its owner sees it. `pid` is the program's own."""

    def __init__(self, guard: subprocess.Popen[bytes], pid: int) -> None:
        self._guard = guard
        self.pid = pid

    @property
    def running(self) -> bool:
        """Whether the program has not ended yet."""
        if self._guard.poll() is None:
            return True
        self._let_go()
        return False

    def signal(self, number: int) -> None:
        """Send a signal to the program itself; nothing happens if it has ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Wait for the end: the exit status, 128 + n for a signal n. Raises subprocess.TimeoutExpired."""
        status = self._guard.wait(timeout_seconds)
        self._let_go()
        return status

    def stop(self) -> int:
        """End the program by its stop signal, or by SIGKILL after the grace, and wait: the exit status."""
        self._let_go()
        return self.wait()

    def _let_go(self) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()


def start(
    command: Sequence[str],
    *,
    stop_signal: signal.Signals = signal.SIGTERM,
    grace_seconds: float = 10.0,
    user: str | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    output: IO[bytes] | None = None,
) -> Guarded:
    """Start `command` under a guard that ends it when this process ends. `output` takes what it prints.

    `user` runs it with the rights of that account, for callers that are root. Raises OSError if it cannot be started;
    the reason is then in the output.
    """
    reader, writer = os.pipe()
    try:
        guard = subprocess.Popen(
            _guard_command(command, stop_signal, grace_seconds, user, writer),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            cwd=cwd,
            env=env,
            pass_fds=[writer],
            start_new_session=True,
        )
    finally:
        os.close(writer)
    with os.fdopen(reader, encoding="ascii") as pipe:
        pid = pipe.read()
    if not pid:
        Guarded(guard, 0).stop()
        raise OSError(f"{command[0]} cannot be started")
    return Guarded(guard, int(pid))


def _guard_command(
    command: Sequence[str],
    stop_signal: signal.Signals,
    grace_seconds: float,
    user: str | None,
    pid_fd: int,
) -> list[str]:
    # By path, isolated and without site-packages: no installed hook can slow it down, nothing can shadow a module.
    own = [sys.executable, "-I", "-S", os.path.abspath(__file__)]  # noqa: PTH100  (pathlib would follow links)
    options = ["--signal", stop_signal.name, "--grace", str(grace_seconds), "--pid-fd", str(pid_fd)]
    as_user = [] if user is None else ["--user", user]
    return [*own, *options, *as_user, "--", *command]


def main(arguments: Sequence[str]) -> int:
    """The guard itself, from command line to exit status."""
    options, command = _parse(arguments)
    signal.signal(options.signal, signal.SIG_DFL)  # a background job inherits an ignored SIGINT and would hand it on
    try:
        child = _start_child(command, options.signal, options.user)
    except (OSError, KeyError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"guard: cannot start {command[0]}: {error}\n")
        return _NOT_STARTED
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.send_signal(options.signal))
    if options.pid_fd is not None:
        with os.fdopen(options.pid_fd, "w", encoding="ascii") as pipe:
            pipe.write(str(child.pid))
    threading.Thread(target=_end_with_owner, args=(child, options.signal, options.grace), daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="headrace.guard", usage="%(prog)s [options] -- CMD...")
    parser.add_argument("--signal", type=_signal, default=signal.SIGTERM, help="what ends CMD (default: TERM)")
    parser.add_argument("--grace", type=float, default=10.0, metavar="SECONDS", help="then SIGKILL (default: 10)")
    parser.add_argument("--user", help="account to run CMD as; only root can")
    parser.add_argument("--pid-fd", type=int, metavar="N", help="file descriptor that takes CMD's process id")
    if "--" not in arguments or arguments[-1] == "--":
        parser.error("the command is missing: put it after --")
    cut = list(arguments).index("--")
    return parser.parse_args(arguments[:cut]), list(arguments[cut + 1 :])


def _signal(name: str) -> signal.Signals:
    try:
        return signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{name!r} is no signal") from None


def _start_child(command: list[str], stop_signal: signal.Signals, user: str | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        user=user,
        group=None if user is None else pwd.getpwnam(user).pw_gid,
        extra_groups=None if user is None else [],
        start_new_session=True,
        preexec_fn=_die_with_guard(stop_signal) if sys.platform == "linux" else None,  # noqa: PLW1509  (no thread runs yet)
    )


def _die_with_guard(stop_signal: signal.Signals) -> Callable[[], None]:
    """What the child does between fork and exec. It comes after the change of user, which would undo it."""
    guard = os.getpid()
    libc = ctypes.CDLL(None)

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(stop_signal))
        if os.getppid() != guard:  # it died before we could ask
            os._exit(_NOT_STARTED)

    return ask_kernel


def _end_with_owner(child: subprocess.Popen[bytes], stop_signal: signal.Signals, grace_seconds: float) -> None:
    with contextlib.suppress(OSError):  # a closed standard input has reached its end too
        while os.read(0, 4096):
            pass
    child.send_signal(stop_signal)
    try:
        child.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
