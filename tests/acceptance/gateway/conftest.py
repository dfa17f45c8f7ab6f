"""One gateway with real workers for all of these tests, and the official client with strict validation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from kit.gateways import RunningGateway, gateway_on
from kit.receivers import LOOPBACK
from kit.systems import System, system_on

# A token takes long enough to be caught in the act.
SLOW = {"engine": "echo", "seconds_per_token": 0.02}
# It has no worker.
IDLE = {"engine": "echo"}
MODELS = {"slow": SLOW, "idle": IDLE}


@pytest.fixture(scope="module")
def system(servers: Any, database_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Workers for echo, a slow echo, and tiny-chat."""
    folder = tmp_path_factory.mktemp("gateway")
    changes = {"models": MODELS, "gateway_body_bytes": 1_000_000, "gateway_webhook_networks": LOOPBACK}
    with system_on(servers, database_template, folder, **changes) as one:
        workers = [one.launch(model) for model in ("echo", "slow", "tiny-chat")]
        for worker in workers:
            worker.await_ready()
        yield one


@pytest.fixture(scope="module")
def gateway(system: System) -> Iterator[RunningGateway]:
    """The gateway."""
    with gateway_on(system.settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> openai.OpenAI:
    """Strict: a field that is missing or of another type than its types say is an error."""
    return gateway.client()


@pytest.fixture(scope="module")
def stranger(gateway: RunningGateway) -> openai.OpenAI:
    """The same, of another tenant."""
    return gateway.client("stranger")
