"""The gateway while its servers are away, and once they are back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import redis

from headrace.migrations import upgrade
from headrace.servers import Servers
from jobs.settings import Settings
from kit.databases import SECRET, migrated_template
from kit.gateways import RunningGateway, gateway_on
from kit.systems import PATIENCE_SECONDS, system_on
from kit.waiting import wait_until

HELLO: Any = [{"role": "user", "content": "hello"}]


def refused(call: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


def is_ready(gateway: RunningGateway) -> bool:
    return httpx2.get(f"{gateway.url}/ready").status_code == 200


def test_without_postgres_it_says_so_and_comes_back(own_servers: Servers, tmp_path: Path) -> None:
    """503 with a time to come back, never 500; it is alive, not ready; afterwards it serves without a restart."""
    upgrade(own_servers.database_url)
    urls = {"database_url": own_servers.database_url, "broker_url": own_servers.broker_url, "secret": SECRET}
    settings = Settings.load(home=tmp_path / "home", store_wait_seconds=0.5, **urls)
    with gateway_on(settings) as gateway:
        client = gateway.client()
        made = client.responses.create(model="echo", input="x", background=True)
        own_servers.postgres.stop()
        wait_until(lambda: not is_ready(gateway), PATIENCE_SECONDS, "it is not ready")
        assert httpx2.get(f"{gateway.url}/health").status_code == 200
        calls = (
            lambda: client.chat.completions.create(model="echo", messages=HELLO),
            lambda: client.responses.create(model="echo", input="x", background=True),
            lambda: client.responses.retrieve(made.id),
            client.files.list,
            client.batches.list,
            client.conversations.create,
        )
        for error in map(refused, calls):
            assert error.status_code == 503
            assert 1 <= int(error.response.headers["retry-after"]) <= 60
        own_servers.postgres.start()
        wait_until(lambda: is_ready(gateway), PATIENCE_SECONDS, "it is ready again")
        assert client.responses.retrieve(made.id).status == "queued"


def test_a_stream_survives_the_loss_of_what_redis_had(own_servers: Servers, tmp_path: Path) -> None:
    """Flushed again and again in mid-stream: the text is whole, in the same order, for this listener and the next."""
    models = {"slow": {"engine": "echo", "seconds_per_token": 0.02}}
    text = "word " * 30
    with (
        migrated_template(own_servers.database_url) as template,
        system_on(own_servers, template, tmp_path, models=models) as system,
        gateway_on(system.settings) as gateway,
        redis.Redis.from_url(own_servers.broker_url) as broker,
    ):
        system.start("slow")
        client = gateway.client()
        events: list[Any] = []
        for event in client.responses.create(model="slow", input=text, background=True, stream=True):
            events.append(event)
            if len(events) % 20 == 0:
                broker.flushall()
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type.endswith("delta")) == text
        again: Any = client.responses.retrieve(events[0].response.id, stream=True)
        assert list(again) == events
