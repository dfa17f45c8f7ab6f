"""Webhooks over HTTP: asked for and checked by the official client, sent by a gateway that is held to one tenant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from jobs.webhooks import Webhooks
from kit.gateways import RunningGateway
from kit.receivers import Receiver, receiver
from kit.systems import System

CHAT = "/v1/chat/completions"


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as one:
        yield one


def secret_of(system: System, tenant: str = "local") -> str:
    """As `headrace webhooks secret` shows it."""
    return Webhooks(system.producer.database, str(system.settings.secret)).secrets(tenant)[0]


def ask(client: openai.OpenAI, hook: Receiver, model: str = "echo", **fields: Any) -> Any:
    """A background response whose end is told."""
    asked = {"input": "a private question", "background": True} | fields
    return client.responses.create(model=model, extra_body={"webhook": hook.url}, **asked)


def test_the_end_of_a_response_is_told(client: openai.OpenAI, system: System, hook: Receiver) -> None:
    """The receiver learns the id, and fetches the answer with its key."""
    made = ask(client, hook)
    [told] = hook.await_told(1)
    event = told.verified(secret_of(system))
    assert (event.type, event.data.id) == ("response.completed", made.id)
    assert client.responses.retrieve(event.data.id).output_text == "a private question"


def test_a_cancelled_response_is_told(client: openai.OpenAI, system: System, hook: Receiver) -> None:
    """Whether it waited, and the gateway ended it, or ran, and its worker did."""
    for model in ("idle", "slow"):
        made = ask(client, hook, model, input="word " * 500)
        client.responses.cancel(made.id)
        told = hook.await_told(1)[-1]
        event = told.verified(secret_of(system))
        assert (event.type, event.data.id) == ("response.cancelled", made.id)
        hook.told.clear()


def test_the_end_of_a_chat_is_told(client: openai.OpenAI, system: System, hook: Receiver) -> None:
    """By a name of ours: OpenAI has no event for it."""
    messages: Any = [{"role": "user", "content": "hello"}]
    made = client.chat.completions.create(model="echo", messages=messages, extra_body={"webhook": hook.url})
    [told] = hook.await_told(1)
    assert told.event["type"] == "chat.completion.completed"
    assert told.event["data"]["id"] == made.id
    told.verified(secret_of(system))


def test_the_end_of_a_batch_is_told(client: openai.OpenAI, system: System, hook: Receiver) -> None:
    """Once, for all of its requests; a batch whose file is no good has an end as well."""
    asked = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
    line = json.dumps({"custom_id": "one", "method": "POST", "url": CHAT, "body": asked})
    for content, kind in ((line, "batch.completed"), ("nonsense", "batch.failed")):
        file = client.files.create(file=("in.jsonl", content.encode()), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", extra_body={"webhook": hook.url}
        )
        [told] = hook.await_told(1)
        event = told.verified(secret_of(system))
        assert (event.type, event.data.id) == (kind, made.id)
        assert f"batch.{client.batches.retrieve(made.id).status}" == kind
        hook.told.clear()


def test_each_tenant_has_its_own_secret(gateway: RunningGateway, system: System, hook: Receiver) -> None:
    """What is told of one tenant's jobs is not signed with another's."""
    ask(gateway.client("hooked"), hook)
    [told] = hook.await_told(1)
    told.verified(secret_of(system, "hooked"))
    with pytest.raises(openai.InvalidWebhookSignatureError):
        told.verified(secret_of(system))


@pytest.mark.parametrize("url", ["ftp://a.example/", "http://user@a.example/", "", 5, ["http://a.example/"]])
def test_what_is_no_url_is_refused(client: openai.OpenAI, url: Any) -> None:
    """400, by the name of the field; for a batch too, whose file is looked at later."""
    file = client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    messages: Any = [{"role": "user", "content": "hello"}]
    body = {"webhook": url}
    calls = (
        lambda: client.responses.create(model="echo", input="hello", extra_body=body),
        lambda: client.chat.completions.create(model="echo", messages=messages, extra_body=body),
        lambda: client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", extra_body=body),
    )
    for call in calls:
        with pytest.raises(openai.BadRequestError) as refused:
            call()
        assert refused.value.param == "webhook"
