"""The gateway as a part of the stack: where it is, and whether it answers."""

from __future__ import annotations

import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

from headrace.ports import LOOPBACK, free_port
from jobs.database import Database
from jobs.errors import StoreUnavailable
from jobs.keys import Keys
from jobs.settings import Settings
from jobs.states import Role
from jobs.tables import LOCAL_TENANT

_PROBE_SECONDS = 5.0
_EXTRA = ("fastapi", "httpcore2", "httptools", "prometheus_client", "python_multipart", "uvicorn", "uvloop")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the gateway listens."""

    address: str
    port: int

    @property
    def url(self) -> str:
        """Its address; clients append `/v1`."""
        return f"http://{self.address}:{self.port}"

    @property
    def arguments(self) -> list[str]:
        """How `python -m` starts it."""
        return ["producer.gateway", str(self.port), self.address]

    def answers(self) -> bool:
        """Whether it takes requests."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.url}/ready", timeout=_PROBE_SECONDS) as reply:
                return bool(json.load(reply)["ready"])
        except (urllib.error.URLError, OSError, ValueError):
            return False


def place(port: int | None = None, address: str = LOOPBACK) -> Place:
    """On that port, or a free one."""
    return Place(address, port or free_port())


def installed() -> bool:
    """Whether the extra `headrace[gateway]` is there."""
    return all(importlib.util.find_spec(name) for name in _EXTRA)


@contextmanager
def local_key(settings: Settings) -> Iterator[str]:
    """The secret of a key for whoever may read `stack.json`; it is revoked at the end."""
    assert settings.database_url is not None
    with closing(Database(settings.database_url, settings.store_wait_seconds, pool_size=1)) as database:
        keys = Keys(database)
        key, secret = keys.create(LOCAL_TENANT, roles=list(Role))
        try:
            yield secret
        finally:
            # Nobody else has it; a stack must be able to end although its Postgres is gone.
            with suppress(StoreUnavailable):
                keys.revoke(key.id)
