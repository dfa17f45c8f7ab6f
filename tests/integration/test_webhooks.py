"""Webhooks: every end that is to be told is told, and only to whom it may be."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import UUID

import openai
import orjson
import pytest

from jobs.api_batches import Counts, Fault
from jobs.database import Database
from jobs.errors import IdempotencyConflict, NotFound, RequestInvalid
from jobs.ids import new_id
from jobs.retention import Retention
from jobs.schema import Choice
from jobs.settings import Settings
from jobs.states import DeliveryState
from jobs.webhooks import ROTATION_SECONDS, Webhooks
from kit.contract import Tables, Worker, request_of
from kit.receivers import LOOPBACK, Receiver, receiver
from kit.waiting import wait_until
from producer.client import Producer
from producer.public_network import Address, PublicNetwork
from producer.webhook_sender import MAX_ATTEMPTS, WebhookSender, delay_seconds

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 30.0
RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"

SENDER = """
import asyncio
from jobs.settings import Settings
from producer.client import Producer
from producer.webhook_sender import WebhookSender

with Producer(Settings.load()) as producer:
    asyncio.run(WebhookSender(producer).run())
"""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Those of a test, with loopback allowed."""
    return settings.model_copy(update={"gateway_webhook_networks": LOOPBACK})


@pytest.fixture
def producer(settings: Settings) -> Iterator[Producer]:
    with Producer(settings) as one:
        yield one


@pytest.fixture
def webhooks(producer: Producer) -> Webhooks:
    return producer.webhooks


@pytest.fixture
def tables(database_url: str) -> Iterator[Tables]:
    with closing(Tables(database_url)) as one:
        yield one


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with closing(Database(database_url, pool_size=2)) as one:
        yield one


@pytest.fixture
def worker(database: Database) -> Worker:
    return Worker.hire(database)


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as one:
        yield one


@contextmanager
def sending(producer: Producer, network: PublicNetwork | None = None) -> Iterator[WebhookSender]:
    """A sender at work."""
    loop = asyncio.new_event_loop()
    sender = WebhookSender(producer, network)
    task = loop.create_task(sender.run())
    task.add_done_callback(lambda _: loop.stop())
    thread = threading.Thread(target=loop.run_forever, name="sender", daemon=True)
    thread.start()
    try:
        yield sender
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def submit(producer: Producer, url: str, endpoint: str | None = RESPONSES, **fields: Any) -> UUID:
    return producer.submit(request_of(webhook=url, **fields), endpoint=endpoint).id


def delivery(tables: Tables) -> dict[str, Any]:
    """The only one."""
    [row] = tables.rows("SELECT * FROM webhook_deliveries")
    return row


def await_attempt(tables: Tables, attempts: int) -> dict[str, Any]:
    """The only delivery, once so many attempts have failed."""

    def failed() -> bool:
        row = delivery(tables)
        return bool(row["attempts"] == attempts and row["error"])

    wait_until(failed, PATIENCE_SECONDS, f"{attempts} attempts have failed")
    return delivery(tables)


def await_delivered(tables: Tables, count: int = 1) -> None:
    query = "SELECT count(*) FROM webhook_deliveries WHERE delivered_at IS NOT NULL"
    wait_until(lambda: tables.value(query) == count, PATIENCE_SECONDS, f"{count} webhooks are delivered")


def make_due(tables: Tables) -> None:
    """As if the wait were over."""
    assert tables.execute("UPDATE webhook_deliveries SET next_attempt_at = now(), error = NULL") == 1


# -- told -----------------------------------------------------------------------------------------------------------


def test_an_end_is_told_and_the_official_client_believes_it(
    producer: Producer, worker: Worker, hook: Receiver, tables: Tables, webhooks: Webhooks
) -> None:
    """Signed by the tenant's secret, of OpenAI's type, with the response's id and nothing that was said in it."""
    with sending(producer):
        job = submit(producer, hook.url, prompt="a private question")
        assert tables.count("webhook_deliveries") == 0
        worker.run(job, choices=(Choice(index=0, text="a private answer", finish_reason="stop"),))
        [told] = hook.await_told(1)
        await_delivered(tables)
    [secret] = webhooks.secrets("local")
    event = told.verified(secret)
    assert type(event).__name__ == "ResponseCompletedWebhookEvent"
    assert (event.type, event.object, event.data.id) == ("response.completed", "event", f"resp_{job.hex}")
    assert event.created_at == int(producer.get(job).finished_at.timestamp())  # type: ignore[union-attr]
    assert event.id == told.headers["webhook-id"]
    assert b"private" not in told.body
    assert "private" not in str(delivery(tables))
    with pytest.raises(openai.InvalidWebhookSignatureError):
        told.verified(f"whsec_{base64.b64encode(b'another').decode()}")


@dataclass(frozen=True)
class Hooked:
    """All that the ends of a job take."""

    producer: Producer
    worker: Worker
    hook: Receiver
    tables: Tables

    @property
    def secrets(self) -> list[str]:
        return self.producer.webhooks.secrets("local")


@pytest.fixture
def hooked(producer: Producer, worker: Worker, hook: Receiver, tables: Tables) -> Hooked:
    return Hooked(producer, worker, hook, tables)


def succeed(hooked: Hooked, job: UUID) -> None:
    hooked.worker.run(job)


def run_out(hooked: Hooked, job: UUID) -> None:
    hooked.worker.run(job, choices=(Choice(index=0, text="and so", finish_reason="length"),))


def fail(hooked: Hooked, job: UUID) -> None:
    hooked.worker.run(job, "failed")


def cancel(hooked: Hooked, job: UUID) -> None:
    hooked.producer.cancel(job)


def stop(hooked: Hooked, job: UUID) -> None:
    claim = hooked.worker.claim(job)
    hooked.producer.cancel(job)
    hooked.worker.settle(claim, "retried")


def overdue(hooked: Hooked, job: UUID) -> None:
    hooked.tables.execute("UPDATE jobs SET deadline_at = now() WHERE id = %s", job)
    hooked.producer.store.sweep([])


def lose(hooked: Hooked, job: UUID) -> None:
    hooked.worker.claim(job)
    hooked.tables.end_lease(hooked.worker.id)
    hooked.producer.store.sweep([])


@pytest.mark.parametrize(
    ("end", "endpoint", "kind"),
    [
        (succeed, RESPONSES, "response.completed"),
        (run_out, RESPONSES, "response.incomplete"),
        (fail, RESPONSES, "response.failed"),
        (cancel, RESPONSES, "response.cancelled"),
        (stop, RESPONSES, "response.cancelled"),
        (overdue, RESPONSES, "response.failed"),
        (lose, RESPONSES, "response.failed"),
        (succeed, CHAT, "chat.completion.completed"),
        (succeed, "/v1/completions", "completion.completed"),
        (succeed, None, "job.succeeded"),
        (overdue, None, "job.expired"),
    ],
)
def test_each_end_has_its_event(end: Callable[..., None], endpoint: str | None, kind: str, hooked: Hooked) -> None:
    """Whoever writes the end: worker, sweeper, or whoever cancels."""
    job = submit(hooked.producer, hooked.hook.url, endpoint, max_attempts=1)
    end(hooked, job)
    with sending(hooked.producer):
        [told] = hooked.hook.await_told(1)
    event = told.verified(*hooked.secrets)
    assert event.type == kind
    assert event.data.id.endswith(job.hex if endpoint else str(job))


def test_turns_are_told_too(producer: Producer, worker: Worker, hook: Receiver, tables: Tables) -> None:
    """Their end is written by another statement, which releases the next turn."""
    fields = {"prompt": None, "messages": [{"role": "user", "content": "hello"}], "conversation": "talk"}
    first, second = (submit(producer, hook.url, **fields) for _ in range(2))
    with sending(producer):
        worker.run(first)
        worker.run(second)
        await_delivered(tables, 2)
    assert {told.event["data"]["id"] for told in hook.told} == {f"resp_{job.hex}" for job in (first, second)}


def test_who_wants_nothing_is_told_nothing(producer: Producer, worker: Worker, tables: Tables) -> None:
    """No row is made."""
    job = producer.submit(request_of()).id
    worker.run(job)
    assert tables.count("webhook_deliveries") == 0


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a.example/",
        "a.example",
        "http://",
        "http://user:password@a.example/",
        "http://a.example:99999/",
        "http://a.example/#part",
        "http://a.example/\r\nx: y",
        "http://ä.example/",
        "http://a.example/" + "x" * 2048,
    ],
)
def test_what_is_no_url_is_refused(url: str, producer: Producer) -> None:
    """At the door, by the name of its field."""
    with pytest.raises(RequestInvalid) as refused:
        producer.submit(model="echo", prompt="hello", webhook=url)
    assert refused.value.field == "webhook"


def test_a_line_of_many_has_none(producer: Producer) -> None:
    """It is refused, not forgotten."""
    with pytest.raises(RequestInvalid, match=r"requests\[0\]\.webhook"):
        producer.submit_many([request_of(webhook="https://a.example/")])


# -- again ----------------------------------------------------------------------------------------------------------


def test_a_receiver_that_fails_is_told_again(
    producer: Producer, worker: Worker, tables: Tables, webhooks: Webhooks
) -> None:
    """The same event under the same id, later."""
    with receiver([500]) as hook, sending(producer):
        worker.run(submit(producer, hook.url))
        row = await_attempt(tables, 1)
        assert row["error"] == "the receiver answered 500"
        wait = "SELECT extract(epoch FROM next_attempt_at - now()) FROM webhook_deliveries"
        assert 0 < tables.value(wait) <= 5
        make_due(tables)
        await_delivered(tables)
        first, second = hook.told
    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    second.verified(*webhooks.secrets("local"))


def test_a_sender_that_is_killed_leaves_it_to_another(
    settings: Settings, producer: Producer, worker: Worker, hook: Receiver, tables: Tables
) -> None:
    """Killed between its claim and the receiver's answer: once its time is over another tells it."""
    hook.speaks.clear()
    worker.run(submit(producer, hook.url))
    environment = os.environ | settings.environment() | {"PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.Popen([sys.executable, "-c", SENDER], env=environment)
    try:
        hook.await_told(1)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    hook.speaks.set()
    assert delivery(tables)["delivered_at"] is None
    with sending(producer):
        make_due(tables)
        await_delivered(tables)
    assert len(hook.told) == 2
    assert hook.told[0].body == hook.told[1].body


def test_a_late_sender_changes_nothing(producer: Producer, worker: Worker, hook: Receiver, tables: Tables) -> None:
    """Who has lost a delivery to another neither ends nor delays it."""
    worker.run(submit(producer, hook.url))
    [late] = producer.webhooks.take(10, 60.0)
    assert producer.webhooks.take(10, 60.0) == []
    make_due(tables)
    [current] = producer.webhooks.take(10, 60.0)
    producer.webhooks.failed(late, "late", None)
    producer.webhooks.delivered(late)
    assert delivery(tables)["next_attempt_at"] is not None
    producer.webhooks.delivered(current)
    assert delivery(tables)["delivered_at"] is not None


def test_it_is_given_up_in_the_end(producer: Producer, worker: Worker, tables: Tables, webhooks: Webhooks) -> None:
    """After its last attempt; it is listed, and can be had again."""
    with receiver([500]) as hook, sending(producer) as sender:
        job = submit(producer, hook.url)
        worker.run(job)
        await_attempt(tables, 1)
        hook.answers.append((500, None))
        tables.execute("UPDATE webhook_deliveries SET attempts = %s, next_attempt_at = now()", MAX_ATTEMPTS - 1)
        wait_until(lambda: delivery(tables)["given_up_at"], PATIENCE_SECONDS, "it is given up")
        [record] = webhooks.list("local", state=DeliveryState.GIVEN_UP)
        assert (record.job_id, record.attempts, record.error) == (job, MAX_ATTEMPTS, "the receiver answered 500")
        assert webhooks.list("local", state=DeliveryState.WAITING) == webhooks.list("acme") == []
        assert webhooks.retry_all("acme") == 0
        assert webhooks.retry_all() == 1
        await_delivered(tables)
        each_once = {"failed": 1, "given_up": 1, "delivered": 1}
        wait_until(lambda: sender.attempts == each_once, PATIENCE_SECONDS, "all three are counted")
    with pytest.raises(NotFound):
        webhooks.retry(record.id)


def test_who_is_gone_is_left_alone(producer: Producer, worker: Worker, tables: Tables) -> None:
    """410 says that nothing more is wanted."""
    with receiver([410]) as hook, sending(producer):
        worker.run(submit(producer, hook.url))
        wait_until(lambda: delivery(tables)["given_up_at"], PATIENCE_SECONDS, "it is given up")
    assert delivery(tables)["attempts"] == 1


def test_waits_grow_and_have_an_end() -> None:
    """From seconds to hours; all of them together, a day or two."""
    waits = [[delay_seconds(attempt) for attempt in range(1, MAX_ATTEMPTS)] for _ in range(100)]
    assert all(2.5 <= one[0] <= 5 and max(one) <= 6 * 3600 for one in waits)
    assert all(12 * 3600 < sum(one) < 48 * 3600 for one in waits)
    assert len({one[0] for one in waits}) > 1


# -- where it may go ------------------------------------------------------------------------------------------------


def test_nothing_goes_to_a_private_address(settings: Settings, worker: Worker, hook: Receiver, tables: Tables) -> None:
    """Unless the operator allows it, nothing on this machine is called."""
    with Producer(settings.model_copy(update={"gateway_webhook_networks": None})) as strict, sending(strict):
        worker.run(submit(strict, hook.url))
        row = await_attempt(tables, 1)
    assert "127.0.0.1, which is not public" in row["error"]
    assert hook.told == []


def test_a_name_that_turns_to_a_private_address_is_refused(
    producer: Producer, worker: Worker, hook: Receiver, tables: Tables
) -> None:
    """Public when it is asked for first, loopback the second time: each attempt checks what it connects to."""
    answers = [ip_address("203.0.114.1"), ip_address("127.0.0.1")]
    port = hook.url.rpartition(":")[2]

    async def rebinding(_: str) -> list[Address]:
        return [answers.pop(0)]

    class Wire(PublicNetwork):
        async def _first(self, *_: Any) -> Any:
            raise ConnectionRefusedError("nobody is there")

    network = Wire((), rebinding)
    with sending(producer, network):
        worker.run(submit(producer, f"http://rebinding.example:{port}"))
        assert "nobody is there" in await_attempt(tables, 1)["error"]
        make_due(tables)
        assert "127.0.0.1, which is not public" in await_attempt(tables, 2)["error"]
    assert hook.told == []


def test_redirects_lead_nowhere(producer: Producer, worker: Worker, hook: Receiver, tables: Tables) -> None:
    """A receiver cannot send us on to another address; it has failed."""
    with receiver([(302, hook.url)]) as redirecting, sending(producer):
        worker.run(submit(producer, redirecting.url))
        row = await_attempt(tables, 1)
    assert row["error"] == "the receiver answered 302"
    assert hook.told == []


def test_no_proxy_is_asked(
    producer: Producer, worker: Worker, hook: Receiver, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the environment names would connect to whatever it likes."""
    with receiver() as proxy, sending(producer):
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        worker.run(submit(producer, hook.url))
        await_delivered(tables)
    assert proxy.told == []


def test_silent_receivers_hold_up_nobody_else(
    producer: Producer, worker: Worker, hook: Receiver, tables: Tables
) -> None:
    """However many of one tenant's say nothing, another tenant's is told meanwhile."""
    noisy, other = producer.for_tenant("noisy"), producer.for_tenant("other")
    with receiver() as silent:
        silent.speaks.clear()
        for job in [submit(noisy, silent.url) for _ in range(80)]:
            worker.run(job)
        with sending(producer):
            silent.await_told(16)
            worker.run(submit(other, hook.url))
            hook.await_told(1)
            assert len(silent.told) <= 32
            silent.speaks.set()
            await_delivered(tables, 81)


# -- secrets --------------------------------------------------------------------------------------------------------


def test_after_a_rotation_both_secrets_are_good_for_a_day(
    producer: Producer, worker: Worker, hook: Receiver, tables: Tables, webhooks: Webhooks
) -> None:
    """So that a receiver can change over when it likes; after that the old one is worth nothing."""
    [old] = webhooks.secrets("local")
    webhooks.rotate("local")
    new, still = webhooks.secrets("local")
    assert still == old != new
    with sending(producer):
        worker.run(submit(producer, hook.url))
        [told] = hook.await_told(1)
        told.verified(old)
        told.verified(new)
        earlier = "UPDATE webhook_secrets SET rotated_at = rotated_at - make_interval(secs => %s)"
        tables.execute(earlier, ROTATION_SECONDS)
        assert webhooks.secrets("local") == [new]
        worker.run(submit(producer, hook.url))
        _, later = hook.await_told(2)
    later.verified(new)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        later.verified(old)


def test_tenants_have_secrets_of_their_own(webhooks: Webhooks, database: Database, tables: Tables) -> None:
    """256 bits that no table holds, and that another system's secret does not make."""
    webhooks.rotate("acme")
    secrets = [*webhooks.secrets("acme"), *webhooks.secrets("zeta")]
    secrets += Webhooks(database, "another secret, as long as it has to be").secrets("acme")
    assert len(set(secrets)) == 5
    assert all(len(base64.b64decode(secret.removeprefix("whsec_"))) == 32 for secret in secrets)
    stored = str(tables.rows("SELECT * FROM webhook_secrets"))
    assert not any(secret.removeprefix("whsec_") in stored for secret in secrets)


# -- batches, and the end of it all ---------------------------------------------------------------------------------


def new_batch(producer: Producer, url: str) -> tuple[UUID, UUID]:
    """One in the hands of a runner; both ids."""
    batch, runner = new_id(), new_id()
    producer.api_batches.create(
        batch, "local", endpoint=CHAT, input_file_id=new_id(), metadata={"note": "private"}, webhook=url
    )
    assert producer.api_batches.take(runner) == (batch, "local")
    return batch, runner


def complete(producer: Producer, batch: UUID, runner: UUID) -> None:
    producer.api_batches.started(batch, runner, 1)
    producer.api_batches.finalizing(batch, runner)
    producer.api_batches.ended(
        batch, runner, expired=False, counts=Counts(1, 1), output_file_id=new_id(), error_file_id=None
    )


def find_fault(producer: Producer, batch: UUID, runner: UUID) -> None:
    producer.api_batches.failed(batch, runner, [Fault("empty_file", "There is nothing in it.")])


def call_off(producer: Producer, batch: UUID, runner: UUID) -> None:
    producer.api_batches.cancel(batch, "local")
    producer.api_batches.ended(batch, runner, expired=False, counts=Counts(1), output_file_id=None, error_file_id=None)


def run_late(producer: Producer, batch: UUID, runner: UUID) -> None:
    producer.api_batches.started(batch, runner, 1)
    producer.api_batches.ended(batch, runner, expired=True, counts=Counts(1), output_file_id=None, error_file_id=None)


@pytest.mark.parametrize(
    ("end", "kind"),
    [(complete, "completed"), (find_fault, "failed"), (call_off, "cancelled"), (run_late, "expired")],
)
def test_batches_are_told(end: Callable[..., None], kind: str, hooked: Hooked) -> None:
    """Each of their ends, once."""
    batch, runner = new_batch(hooked.producer, hooked.hook.url)
    end(hooked.producer, batch, runner)
    with sending(hooked.producer):
        [told] = hooked.hook.await_told(1)
        await_delivered(hooked.tables)
    event = told.verified(*hooked.secrets)
    assert type(event).__name__ == f"Batch{kind.title()}WebhookEvent"
    assert (event.type, event.data.id) == (f"batch.{kind}", f"batch_{batch.hex}")
    assert b"private" not in told.body


def test_what_is_purged_leaves_no_delivery(
    producer: Producer, worker: Worker, hook: Receiver, tables: Tables, database: Database
) -> None:
    """Neither of a job nor of a batch, delivered or not; nothing is told of what is not there."""
    worker.run(submit(producer, hook.url))
    batch, runner = new_batch(producer, hook.url)
    find_fault(producer, batch, runner)
    taken = producer.webhooks.take(10, 60.0)
    Retention(database).purge(0.0)
    assert tables.count("webhook_deliveries") == 0
    for one in taken:
        producer.webhooks.failed(one, "late", 5.0)
    assert tables.count("webhook_deliveries") == 0


def test_the_request_says_whom_to_tell(producer: Producer, tables: Tables) -> None:
    """The payload has it word for word, and the same idempotency key with another webhook is another request."""
    fields = {"model": "echo", "prompt": "hello", "idempotency_key": "one"}
    first = producer.submit(**fields, webhook="https://a.example/?x=%20")
    stored = tables.value("SELECT request::text FROM payloads WHERE job_id = %s", first.id)
    assert orjson.loads(stored)["webhook"] == "https://a.example/?x=%20"
    assert producer.submit(**fields, webhook="https://a.example/?x=%20").id == first.id
    with pytest.raises(IdempotencyConflict):
        producer.submit(**fields)
