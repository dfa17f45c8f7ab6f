"""Everything that serving on one machine takes, as one thing that starts, lasts and ends.

    with Stack(Settings.load(), ["tiny-chat"]) as stack:    # servers, tables, workers, Flower: all of them answer
        stack.watch()                                       # starts again what ends; raises when that does not help

Order of start: the home's lock, Postgres and Redis (unless the settings name servers), tables, workers, Flower, the
gateway, `stack.json`. The end is the same backwards. Everything runs under `headrace.guard`: however suddenly this
process ends, nothing of it stays behind.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Self

from alembic.util import CommandError
from sqlalchemy.exc import OperationalError

from headrace import flower, gateway
from headrace.children import Child, Keeper, Program, ServerChild, await_answer
from headrace.migrations import upgrade
from headrace.servers import Servers
from headrace.tellers import Silent, Teller
from headrace.workforce import Workforce
from jobs.access import admit_gateway
from jobs.errors import StoreUnavailable
from jobs.home import Home, NoStack, Record, StackError, StackTaken, child_environment, connected_settings
from jobs.settings import Settings

__all__ = ["NoStack", "Record", "Stack", "StackError", "StackTaken", "connected_settings", "migrate"]

_WATCH_SECONDS = 0.5
_FLOWER_START_SECONDS = 60.0
_FLOWER_GRACE_SECONDS = 5.0
_GATEWAY_START_SECONDS = 60.0
_GATEWAY_GRACE_SECONDS = 15.0


class Stack:
    """Servers, tables, workers for `models`, Flower and the gateway, on one home. A context manager.

    `command` is who holds the home: "up" publishes `stack.json` for others; "run" is a stack of one process alone.
    Raises StackTaken if the home has a stack, ServerError, StoreUnavailable or StackError if a part does not start;
    nothing is left running then.
    """

    def __init__(
        self,
        settings: Settings,
        models: Sequence[str] = (),
        *,
        gpus: str | None = None,
        with_flower: bool = True,
        flower_port: int | None = None,
        with_gateway: bool = False,
        gateway_port: int | None = None,
        command: str = "up",
        teller: Teller | None = None,
    ) -> None:
        self.home = Home(settings.home)
        self.settings = settings  # names the servers once they are up
        self.workforce: Workforce  # once they are up
        self.record: Record | None = None  # what stack.json says
        self._models = list(dict.fromkeys(models))
        self._gpus = gpus
        self._with_flower = with_flower
        self._flower_port = flower_port
        self._with_gateway = with_gateway
        self._gateway_port = gateway_port
        self._gateway_key: str | None = None
        self._command = command
        self._teller = teller or Silent()
        self._keepers: list[Keeper] = []
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        access, place = self._grant(), self._place()
        with ExitStack() as undo:
            undo.enter_context(self.home.hold(self._command))
            if self.settings.database_url is None:
                undo.enter_context(self._servers())
            with self._teller.step("tables"):
                migrate(self.settings)
            self.workforce = undo.enter_context(Workforce(self.settings, gpus=self._gpus, teller=self._teller))
            for model in self._models:
                self.workforce.start(model)
            self.workforce.await_ready()
            # After the workers: Flower asks them for their queues once, when it starts.
            if access is not None:
                undo.enter_context(self._flower(access))
            if place is not None:
                undo.enter_context(self._gateway(place))
            if self._command == "up":
                undo.enter_context(self._published(access, place))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def check(self) -> None:
        """Start again what has ended. Raises StackError once that does not help."""
        for keeper in self._keepers:
            keeper.check()
        self.workforce.check()

    def watch(self, stop: threading.Event | None = None) -> None:
        """Keep everything running until `stop`. Raises StackError once something has ended for good."""
        stop = stop or threading.Event()
        while not stop.wait(_WATCH_SECONDS):
            self.check()

    @contextmanager
    def _servers(self) -> Iterator[None]:
        servers = Servers(self.home.folder)
        with self._teller.step("Postgres and Redis"):
            servers.start()
        try:
            self.settings = self.settings.model_copy(
                update={
                    "database_url": servers.database_url,
                    "gateway_database_url": servers.gateway_database_url,
                    "broker_url": servers.broker_url,
                    "secret": self.settings.secret or servers.secret,
                }
            )
            self._keep(ServerChild(servers.postgres))
            self._keep(ServerChild(servers.redis))
            yield
        finally:
            with self._teller.step("stopping Postgres and Redis"):
                servers.stop()

    def _grant(self) -> flower.Access | None:
        if not self._with_flower:
            return None
        if not flower.installed():
            self._teller.note('no Flower: it is not installed here (pip install "headrace[flower]")')
            return None
        return flower.grant(self._flower_port)

    @contextmanager
    def _flower(self, access: flower.Access) -> Iterator[None]:
        program = Program(
            "Flower",
            flower.arguments(access),
            environment=child_environment(self.settings) | access.environment,
            log=self.home.log("flower"),
            grace_seconds=_FLOWER_GRACE_SECONDS,
        )
        try:
            with self._teller.step("Flower"):
                program.start()
                await_answer(program, access.answers, _FLOWER_START_SECONDS)
            self._keep(program)
            yield
        finally:
            program.stop()

    def _place(self) -> gateway.Place | None:
        if not self._with_gateway:
            return None
        if not gateway.installed():
            self._teller.note('no gateway: it is not installed here (pip install "headrace[gateway]")')
            return None
        return gateway.place(self._gateway_port)

    @contextmanager
    def _gateway(self, place: gateway.Place) -> Iterator[None]:
        program = Program(
            "gateway",
            place.arguments,
            environment=child_environment(self.settings.for_gateway()),
            log=self.home.log("gateway"),
            grace_seconds=_GATEWAY_GRACE_SECONDS,
        )
        with gateway.local_key(self.settings) as self._gateway_key:
            try:
                with self._teller.step("gateway"):
                    program.start()
                    await_answer(program, place.answers, _GATEWAY_START_SECONDS)
                self._keep(program)
                yield
            finally:
                program.stop()

    @contextmanager
    def _published(self, access: flower.Access | None, place: gateway.Place | None) -> Iterator[None]:
        self.record = self._describe(access, place)
        self.home.publish(self.record)
        try:
            yield
        finally:
            self.home.withdraw()

    def _describe(self, access: flower.Access | None, place: gateway.Place | None) -> Record:
        assert self.settings.database_url is not None
        assert self.settings.broker_url is not None
        assert self.settings.secret is not None
        return Record(
            pid=os.getpid(),
            database_url=self.settings.database_url,
            gateway_database_url=self.settings.gateway_database_url,
            broker_url=self.settings.broker_url,
            secret=self.settings.secret,
            key_prefix=self.settings.key_prefix,
            flower_url=None if access is None else access.url,
            flower_user=None if access is None else access.user,
            flower_password=None if access is None else access.password,
            models=self._models,
            model_tables=self.settings.models,
            policies=self.settings.policies,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            gateway_url=None if place is None else place.url,
            gateway_key=self._gateway_key,
        )

    def _keep(self, child: Child) -> None:
        self._keepers.append(Keeper(child, self._teller.note))


def migrate(settings: Settings) -> None:
    """Bring the database to the newest schema, and admit the gateway's user, if the settings name one.

    Raises StoreUnavailable, SettingsError about that user, or StackError if a newer version made the database.
    """
    assert settings.database_url is not None
    try:
        upgrade(settings.database_url)
        if settings.gateway_database_url is not None:
            assert settings.secret is not None
            admit_gateway(settings.database_url, settings.gateway_database_url, settings.secret)
    except OperationalError as error:
        raise StoreUnavailable(f"Postgres did not answer: {str(error.orig).splitlines()[0]}") from error
    except CommandError as error:
        raise StackError(f"the database cannot be migrated: {error}") from error
