"""Commands of the stack on one machine: up, down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from headrace.commands.common import (
    INTERRUPTED,
    SUCCESS,
    AsJson,
    Gpus,
    check_models,
    interruptible,
)
from jobs.home import DEFAULT_MODEL, Home, Record, StackError, StackTaken

if TYPE_CHECKING:
    from jobs.settings import Settings

_POLL_SECONDS = 0.1
# How long `down` waits beyond the drain: for Flower, the workers' goodbyes and a clean shutdown of Postgres.
_DOWN_SECONDS = 120.0

Models = Annotated[list[str] | None, typer.Option("--model", help="Model to serve. Repeatable. Default: tiny-chat.")]
GatewayPort = Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the gateway. Default: a free one.")]
FlowerPort = Annotated[int | None, typer.Option(min=1, max=65535, help="Port of Flower. Default: a free one.")]


def up(
    *,
    model: Models = None,
    gpus: Gpus = None,
    flower_port: FlowerPort = None,
    flower: Annotated[bool, typer.Option(help="Start Flower.")] = True,
    gateway_port: GatewayPort = None,
    gateway: Annotated[bool, typer.Option(help="Start the HTTP gateway.")] = True,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Go on in the background.")] = False,
    as_json: AsJson = False,
) -> int:
    """Start Postgres, Redis, workers, Flower and the gateway, and keep them running until Ctrl-C or `headrace down`.

    Where HEADRACE_DATABASE_URL and HEADRACE_BROKER_URL are set, those servers are used instead of own ones.
    Addresses and credentials are in stack.json in HEADRACE_HOME while the stack is up.
    """
    from jobs.settings import Settings

    settings = Settings.load()
    models = model or [DEFAULT_MODEL]
    check_models(settings, models)
    parts = _Parts(flower=flower, flower_port=flower_port, gateway=gateway, gateway_port=gateway_port)
    if not detach:
        return _stay_up(settings, models, gpus, parts, as_json=as_json)
    home = Home(settings.home)
    _start_detached(home, _own_arguments(models, gpus, parts))
    _show_record(home, as_json=as_json)
    return SUCCESS


@dataclass(frozen=True, slots=True)
class _Parts:
    """What runs beside the workers, and where."""

    flower: bool
    flower_port: int | None
    gateway: bool
    gateway_port: int | None


def _stay_up(settings: Settings, models: Sequence[str], gpus: str | None, parts: _Parts, *, as_json: bool) -> int:
    from headrace.show import Terminal
    from headrace.stack import Stack

    terminal = Terminal()
    stack = Stack(
        settings,
        models,
        gpus=gpus,
        with_flower=parts.flower,
        flower_port=parts.flower_port,
        with_gateway=parts.gateway,
        gateway_port=parts.gateway_port,
        teller=terminal,
    )
    try:
        with interruptible(), stack:
            _show_record(stack.home, as_json=as_json)
            terminal.note("Ctrl-C or `headrace down` stops it.")
            stack.watch()
    except KeyboardInterrupt:
        return INTERRUPTED if stack.record is None else SUCCESS
    return SUCCESS


def _own_arguments(models: Sequence[str], gpus: str | None, parts: _Parts) -> list[str]:
    arguments = [part for model in models for part in ("--model", model)]
    arguments += [] if gpus is None else ["--gpus", gpus]
    arguments += [] if parts.flower_port is None else ["--flower-port", str(parts.flower_port)]
    arguments += [] if parts.gateway_port is None else ["--gateway-port", str(parts.gateway_port)]
    arguments += [] if parts.flower else ["--no-flower"]
    return arguments if parts.gateway else [*arguments, "--no-gateway"]


def _start_detached(home: Home, arguments: Sequence[str]) -> None:
    """Start `headrace up` in a session of its own and wait until it is up. Raises StackError with its last words."""
    from headrace.show import Terminal

    holder = home.holder()
    if holder is not None:
        raise StackTaken(f"{home.folder} is in use by {holder}")
    log = home.log("stack")
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        log_start = output.seek(0, os.SEEK_END)
        # Safe path (-P): what lies in the current folder is none of our modules.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "headrace", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with interruptible(), Terminal().step("the stack"):
            is_up = _comes_up(home, child)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if not is_up:
        raise StackError(f"the stack ended while starting; it said, in {log}:\n{_said(log, log_start)}")


def _said(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").rstrip()


def _comes_up(home: Home, child: subprocess.Popen[bytes]) -> bool:
    """Wait for its `stack.json`. False: it ended before."""
    while (record := home.record()) is None or record.pid != child.pid:
        if child.poll() is not None:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _show_record(home: Home, *, as_json: bool) -> None:
    from headrace import show

    record = home.record()
    assert record is not None
    addresses = _addresses(record)
    if as_json:
        about = {"pid": record.pid, "models": record.models, "stack_file": str(home.stack_file)}
        show.emit(about | addresses)
        return
    login = record.flower_url and f"{record.flower_url} (user {record.flower_user}, password in stack.json)"
    rows = [
        ("models", ", ".join(record.models)),
        ("Postgres", addresses["database"]),
        ("Redis", addresses["broker"]),
        ("Flower", login),
        ("gateway", record.gateway_url and f"{record.gateway_url}/v1 (key in stack.json)"),
        ("credentials", str(home.stack_file)),
        ("logs", str(home.folder / "logs")),
    ]
    show.out().print(show.facts(rows))


def _addresses(record: Record) -> dict[str, str | None]:
    """Where things are, without passwords."""
    database, broker = urlsplit(record.database_url), urlsplit(record.broker_url)
    return {
        "database": f"{database.hostname}:{database.port or 5432}{database.path}",
        "broker": f"{broker.hostname}:{broker.port or 6379}{broker.path}",
        "flower_url": record.flower_url,
        "flower_user": record.flower_user,
        "gateway_url": record.gateway_url,
    }


def down(*, as_json: AsJson = False) -> int:
    """Stop the stack of this home cleanly: running jobs end or go back to the queue, data stay."""
    from headrace import show
    from jobs.settings import Settings

    settings = Settings.load()
    home = Home(settings.home)
    holder = home.holder()
    if holder is not None and holder.command != "up":
        raise StackError(f"{home.folder} is in use by {holder}; end that with Ctrl-C")
    if holder is not None:
        with show.Terminal().step("stopping the stack"):
            _end(home, holder.pid, settings.drain_seconds + _DOWN_SECONDS)
    if as_json:
        show.emit({"stopped": holder is not None, "pid": holder and holder.pid})
    elif holder is None:
        typer.echo(f"no stack is up on {home.folder}")
    return SUCCESS


def _end(home: Home, pid: int, patience_seconds: float) -> None:
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_seconds
    while (holder := home.holder()) is not None and holder.pid == pid:
        if time.monotonic() > deadline:
            raise StackError(f"the stack, pid {pid}, did not end within {patience_seconds:g} s")
        time.sleep(_POLL_SECONDS)


def register(app: Any) -> None:
    """Put the commands into the application."""
    for function in (up, down):
        app.command(rich_help_panel="The stack on one machine")(function)
