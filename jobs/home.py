"""The folder of the one-machine stack: who holds it, and where its servers are.

    stack.lock    held by `flock` for as long as a stack lives; names its holder
    stack.json    mode 0600: addresses and credentials, there from the moment the stack is up until it ends
    logs/         one file for each program of the stack

A `stack.json` beside a free lock was left behind by a killed stack and counts for nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import HeadraceError

if TYPE_CHECKING:
    from jobs.settings import Settings

DEFAULT_MODEL = "tiny-chat"

# Whoever looks whether the lock is free holds it, shared, for some microseconds.
_LOCK_TRIES = 20
_LOCK_PAUSE_SECONDS = 0.05
# A log that is longer when its program starts is set aside as NAME.old.
_LOG_BYTES = 10_000_000


class StackError(HeadraceError):
    """The stack cannot start, or ended because one of its programs did."""


class StackTaken(StackError):
    """Another process holds the home."""


class NoStack(StackError):
    """No stack is up, and the settings name no servers."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a home."""

    pid: int
    command: str  # "up", or "run" for the private stack of one run

    def __str__(self) -> str:
        return f"`headrace {self.command}`, pid {self.pid}"


@dataclass(frozen=True, slots=True)
class Record:
    """What `stack.json` says: where a stack is and how to use it."""

    pid: int
    database_url: str = field(repr=False)
    gateway_database_url: str | None = field(repr=False)
    broker_url: str = field(repr=False)
    secret: str = field(repr=False)
    key_prefix: str
    flower_url: str | None
    flower_user: str | None
    flower_password: str | None = field(repr=False)
    models: list[str]  # those that the stack keeps a worker for
    model_tables: dict[str, dict[str, Any]]  # `[models.NAME]` of its settings, so that its clients know them too
    policies: dict[str, dict[str, dict[str, Any]]]  # `[policies]` of its settings: they hold for its clients too
    started_at: str  # ISO 8601, UTC
    gateway_url: str | None = None  # clients append `/v1`
    gateway_key: str | None = field(default=None, repr=False)  # of the local tenant; good while the stack is up


class Home:
    """The folder of one stack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack_file = folder / "stack.json"
        self._lock = folder / "stack.lock"

    @contextmanager
    def hold(self, command: str) -> Iterator[None]:
        """Be the one stack of this home. Raises StackTaken, naming who is."""
        self._make()
        with os.fdopen(os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8") as file:
            if not _acquire(file.fileno()):
                raise StackTaken(f"{self.folder} is in use by {self.holder() or 'a process that has just ended'}")
            self.stack_file.unlink(missing_ok=True)
            file.truncate()
            file.write(json.dumps({"pid": os.getpid(), "command": command}))
            file.flush()
            yield

    def holder(self) -> Holder | None:
        """Who holds the home; None if nobody does."""
        for _ in range(_LOCK_TRIES):
            try:
                with self._lock.open(encoding="utf-8") as file:
                    return None if _is_free(file.fileno()) else Holder(**json.load(file))
            except FileNotFoundError:
                return None
            except (ValueError, TypeError):  # it has just been taken, and not been signed yet
                time.sleep(_LOCK_PAUSE_SECONDS)
        raise StackError(f"{self._lock} is held by a process that did not sign it")

    def publish(self, record: Record) -> None:
        """Write `stack.json`, whole or not at all, for the owner's eyes alone."""
        new = self.stack_file.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(record), file, indent=2)
        new.rename(self.stack_file)

    def withdraw(self) -> None:
        """Remove `stack.json`: nobody new comes to this stack."""
        self.stack_file.unlink(missing_ok=True)

    def record(self) -> Record | None:
        """The stack that is up on this home; None if none is, or not yet."""
        if self.holder() is None:
            return None
        try:
            return Record(**json.loads(self.stack_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise StackError(f"{self.stack_file} was written by another version: {error}") from None

    def log(self, name: str) -> Path:
        """The log of a program, to append to; a long one is set aside first."""
        self._make()
        folder = self.folder / "logs"
        folder.mkdir(mode=0o700, exist_ok=True)
        log = folder / f"{name.replace('/', '_')}.log"
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".log.old"))
        return log

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def connected_settings(settings: Settings | None = None) -> Settings:
    """Settings with both servers: as configured, else those of the stack that is up on the home. Raises NoStack."""
    from jobs.settings import Settings  # its libraries would be most of the time that `headrace --help` takes

    own = settings or Settings.load()
    if own.database_url is not None:
        return own
    record = Home(own.home).record()
    if record is None:
        raise NoStack(_no_stack(Home(own.home)))
    names = ("database_url", "gateway_database_url", "broker_url", "secret", "key_prefix")
    servers = {name: getattr(record, name) for name in names}
    tables = {"models": record.model_tables | own.models, "policies": record.policies | own.policies}
    return own.model_copy(update=servers | tables)


def child_environment(settings: Settings) -> dict[str, str]:
    """What one of our programs needs, besides the environment it inherits, to see these settings. Has passwords."""
    # Safe path: a folder `jobs` or `models` where the user happens to stand is none of our packages.
    return settings.environment() | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def _no_stack(home: Home) -> str:
    holder = home.holder()
    if holder is None:
        return (
            f"no stack is up on {home.folder}: run `headrace up --detach`, "
            "or set HEADRACE_DATABASE_URL and HEADRACE_BROKER_URL"
        )
    if holder.command == "run":
        return f"{home.folder} is in use by {holder}, for itself alone; wait for its end, or see `headrace up`"
    return f"the stack on {home.folder} is starting or stopping ({holder}); try again in a moment"


def _acquire(descriptor: int) -> bool:
    for _ in range(_LOCK_TRIES):
        if _try_lock(descriptor, fcntl.LOCK_EX):
            return True
        time.sleep(_LOCK_PAUSE_SECONDS)
    return False


def _is_free(descriptor: int) -> bool:
    return _try_lock(descriptor, fcntl.LOCK_SH)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
