"""A gateway for a test: the real application on a real port, and clients with keys of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import uvicorn

from jobs.keys import ApiKey, Keys
from kit.waiting import wait_until
from producer.client import Producer
from producer.gateway.app import create_app

START_SECONDS = 30.0


@dataclass(frozen=True)
class RunningGateway:
    """Where a gateway listens."""

    url: str
    producer: Producer
    clients: list[openai.OpenAI] = field(default_factory=list)

    def key(self, tenant: str = "local", **fields: Any) -> tuple[ApiKey, str]:
        """A new key of the tenant, and its secret."""
        return Keys(self.producer.database).create(tenant, **fields)

    def client(self, tenant: str = "local", *, secret: str | None = None, **options: Any) -> openai.OpenAI:
        """The official client, which takes nothing that its types do not say, and tries nothing twice."""
        fields = {"max_retries": 0, "timeout": 60.0, "_strict_response_validation": True} | options
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret or self.key(tenant)[1], **fields)
        self.clients.append(made)
        return made


@contextmanager
def gateway_on(producer: Producer) -> Iterator[RunningGateway]:
    """A gateway on this producer, on a free port of loopback."""
    config = uvicorn.Config(create_app(producer), host="127.0.0.1", port=0, log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="gateway", daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), START_SECONDS, "the gateway listens")
        port = server.servers[0].sockets[0].getsockname()[1]
        running = RunningGateway(f"http://127.0.0.1:{port}", producer)
        yield running
        for client in running.clients:
            client.close()
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)
