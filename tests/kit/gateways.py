"""A gateway for a test: the real application on a real port, held to one tenant by Postgres, and clients with keys."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
from sqlalchemy import make_url

from jobs.access import admit_gateway
from jobs.database import Database
from jobs.keys import ApiKey, Keys
from jobs.settings import Settings
from kit.waiting import wait_until
from producer.client import Producer
from producer.gateway.serving import server_of

START_SECONDS = 120.0
# Roles are the whole server's: every test's gateway is the same user.
_USER = {"username": "headrace_test_gateway", "password": "pass"}


@dataclass(frozen=True)
class RunningGateway:
    """Where a gateway listens. `keys` is the operator's way to them, not the gateway's."""

    url: str
    keys: Keys
    clients: list[openai.OpenAI] = field(default_factory=list)

    def key(self, tenant: str = "local", **fields: Any) -> tuple[ApiKey, str]:
        """A new key of the tenant, and its secret."""
        return self.keys.create(tenant, **fields)

    def client(self, tenant: str = "local", *, secret: str | None = None, **options: Any) -> openai.OpenAI:
        """The official client, which takes nothing that its types do not say, and tries nothing twice."""
        fields = {"max_retries": 0, "timeout": 60.0, "_strict_response_validation": True} | options
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret or self.key(tenant)[1], **fields)
        self.clients.append(made)
        return made


@contextmanager
def gateway_on(settings: Settings) -> Iterator[RunningGateway]:
    """A gateway on these servers, on a free port of loopback, as a user whom Postgres shows one tenant at a time."""
    owner_url = str(settings.database_url)
    url = make_url(owner_url).set(**_USER).render_as_string(hide_password=False)
    admit_gateway(owner_url, url, str(settings.secret))
    with (
        closing(Database(owner_url, pool_size=2)) as owner,
        Producer(settings.model_copy(update={"database_url": url})) as producer,
        _serving(producer) as address,
    ):
        running = RunningGateway(address, Keys(owner))
        try:
            yield running
        finally:
            for client in running.clients:
                client.close()


@contextmanager
def _serving(producer: Producer) -> Iterator[str]:
    server = server_of(producer, 0)
    thread = threading.Thread(target=server.run, name="gateway", daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), START_SECONDS, "the gateway listens")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)
