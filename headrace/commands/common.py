"""What commands share: options, exit statuses, the way to a producer, and how a signal ends a command."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn
from uuid import UUID

import typer

from jobs.errors import HeadraceError
from jobs.home import StackError

if TYPE_CHECKING:
    from types import FrameType

    from jobs.database import Database
    from jobs.settings import Settings
    from producer.client import Producer

SUCCESS = 0
FAILURE = 1
USAGE = 2
NOT_ALL_SUCCEEDED = 3
INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Gpus = Annotated[
    str | None,
    typer.Option(metavar="N[,N...]", help="CUDA devices of each worker. Default: the driver's choice, or the CPU."),
]
JobId = Annotated[UUID, typer.Argument(metavar="ID", help="The job's id.")]

_END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Refused(HeadraceError):
    """What was asked cannot be done; nothing was begun."""

    exit_code = USAGE


@contextmanager
def open_producer(settings: Settings) -> Iterator[Producer]:
    """A producer. A database that was never migrated is a StackError."""
    from producer.client import Producer

    with _migrated(), Producer(settings) as producer:
        yield producer


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """Postgres alone, for commands that are not about jobs. A database that was never migrated is a StackError."""
    from jobs.database import Database

    assert settings.database_url is not None
    with _migrated(), closing(Database(settings.database_url, settings.store_wait_seconds)) as database:
        yield database


@contextmanager
def _migrated() -> Iterator[None]:
    import psycopg
    from sqlalchemy.exc import ProgrammingError

    try:
        yield
    except (ProgrammingError, psycopg.ProgrammingError) as error:
        reason = str(getattr(error, "orig", error)).splitlines()[0]
        raise StackError(f"the database has not the tables of this version ({reason}): `headrace migrate`") from error


def check_models(settings: Settings, models: Sequence[str]) -> None:
    """Tell before anything starts of a wrong name or folder. Raises SettingsError, UnknownModel or Refused."""
    from models.prompt import PromptError, load_prompt_format
    from producer.validation import catalog_of

    catalog = catalog_of(settings)
    for model in models:
        spec = catalog.get(model)
        try:
            if spec.folder is not None:
                load_prompt_format(spec)
        except PromptError as error:
            raise Refused(f"model {model!r} cannot be served: {error.message}") from error


class Interrupts:
    """What the first signal to end does: `action`. By default it raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.action: Callable[[], None] = _interrupt

    def handle(self, *_: int | FrameType | None) -> None:
        """From now on only another Ctrl-C counts, and ends the command at once. Guards clean up behind it."""
        for number in _END_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.action()


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Inside, Ctrl-C, SIGTERM and a closed terminal end the command in good order."""
    interrupts = Interrupts()
    before = {number: signal.signal(number, interrupts.handle) for number in _END_SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt
