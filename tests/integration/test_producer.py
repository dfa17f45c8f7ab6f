"""The one way in, on real servers: what is accepted, published, awaited and refused, and what happens without them."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis

import producer.client
from headrace.migrations import upgrade
from headrace.servers import Servers
from jobs.dispatch import DRAIN, RUN_JOB, queue_name
from jobs.errors import (
    Forbidden,
    IdempotencyConflict,
    ModelUnknown,
    NotFound,
    RequestInvalid,
    StoreUnavailable,
    WaitTimeout,
)
from jobs.home import NoStack
from jobs.ids import new_id
from jobs.keys import ApiKey
from jobs.schema import Job, JobRequest
from jobs.settings import Settings
from jobs.signals import CANCEL, ENDED, Signals
from jobs.signing import MessageSigner
from jobs.states import Lane, State
from kit.contract import Tables, Worker
from kit.databases import SECRET, connect, temporary_database
from kit.waiting import wait_until
from producer.client import Producer

PATIENCE_SECONDS = 30.0
# What a submit may take with a broker that does not answer: ten times what it waits, for a machine that is busy.
BOUND_SECONDS = 5.0
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def module_database_url(servers: Any, database_template: str) -> Iterator[str]:
    """One database for all of these tests, for making one takes longer than most of them."""
    with temporary_database(servers.database_url, database_template) as url:
        yield url


@pytest.fixture
def database_url(module_database_url: str) -> str:
    """It, emptied."""
    with closing(Tables(module_database_url)) as tables:
        tables.empty()
    return module_database_url


@pytest.fixture
def client(settings: Settings) -> Iterator[Producer]:
    with Producer(settings) as made:
        yield made


@pytest.fixture
def tables(settings: Settings) -> Iterator[Tables]:
    with closing(Tables(str(settings.database_url))) as opened:
        yield opened


@pytest.fixture
def worker(client: Producer) -> Worker:
    return Worker.hire(client.database)


@pytest.fixture
def broker(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(str(settings.broker_url)) as connection:
        yield connection


@pytest.fixture
def announce(settings: Settings) -> Iterator[Callable[[Job], bool]]:
    """What a worker does after its commit."""
    with closing(Signals(settings)) as signals:
        yield lambda job: signals.publish(ENDED, [job.id])


def messages(broker: redis.Redis, settings: Settings, queue: str) -> list[dict[str, Any]]:
    """Headers, properties and arguments of what lies in a Celery queue, in every priority's list."""
    found = []
    for key in broker.scan_iter(f"{settings.key_prefix}:{queue}*", count=1000):
        for raw in broker.lrange(key, 0, -1):
            message = json.loads(raw)
            arguments, _, _ = json.loads(base64.b64decode(message["body"]))
            found.append(message["headers"] | message["properties"] | {"arguments": arguments})
    return found


def interactive(broker: redis.Redis, settings: Settings, model: str = "echo") -> list[dict[str, Any]]:
    return messages(broker, settings, queue_name(model, Lane.INTERACTIVE))


# == submit =====================================================================================================


def test_submit(client: Producer, settings: Settings, tables: Tables, broker: redis.Redis) -> None:
    """A job is a committed row and then a message that names it, under its own id, in its route's queue."""
    job = client.submit(model="echo", prompt="hello", priority=3, metadata={"a": "b"})
    assert (job.state, job.model, job.lane, job.metadata) == (State.QUEUED, "echo", Lane.INTERACTIVE, {"a": "b"})
    assert tables.state(job.id) is State.QUEUED
    [message] = interactive(broker, settings)
    assert (message["id"], message["task"], message["arguments"][0]) == (str(job.id), RUN_JOB, str(job.id))
    assert MessageSigner(SECRET).knows(message["arguments"][1], RUN_JOB, str(job.id))
    assert message["arguments"][1] not in message["argsrepr"]
    assert (message["correlation_id"], message["priority"]) == (str(job.id), 3)


def test_published_is_noted(client: Producer, tables: Tables) -> None:
    """After the message is out its time is noted in the row, so that the sweeper does not send another."""
    made = [client.submit(model="echo", prompt="hello") for _ in range(3)]
    noted = "SELECT count(*) FROM jobs WHERE published_at IS NOT NULL"
    wait_until(lambda: tables.value(noted) == len(made), PATIENCE_SECONDS, "every message's time is noted")


def test_closing_notes_what_was_published(settings: Settings, tables: Tables) -> None:
    """A producer that submits and leaves at once has noted it."""
    with Producer(settings) as client:
        job = client.submit(model="echo", prompt="hello")
    assert tables.job(job.id)["published_at"] is not None


def test_submit_fills_in_the_models_defaults(client: Producer, worker: Worker) -> None:
    """The worker reads a request in which nothing is left open."""
    checked = worker.claim(client.submit(model="echo", prompt="hello").id).request
    assert checked.max_tokens is not None
    assert checked.temperature is not None


def test_submit_of_a_request(client: Producer) -> None:
    """A request that was made elsewhere is accepted as it is."""
    request = JobRequest(model="echo", prompt="hello", max_attempts=7)
    assert client.submit(request).max_attempts == 7
    with pytest.raises(TypeError, match="not both"):
        client.submit(request, max_attempts=1)


def test_submit_again_with_the_same_id(client: Producer, settings: Settings, broker: redis.Redis) -> None:
    """A client that does not know whether its submit arrived repeats it: one job; a second message does no harm."""
    job_id = new_id()
    first = client.submit(job_id=job_id, model="echo", prompt="hello")
    assert client.submit(job_id=job_id, model="echo", prompt="hello").id == first.id == job_id
    assert {message["id"] for message in interactive(broker, settings)} == {str(job_id)}
    with pytest.raises(IdempotencyConflict):
        client.submit(job_id=job_id, model="echo", prompt="other")


def test_the_message_goes_out_while_the_row_is_committed(
    client: Producer, settings: Settings, tables: Tables, broker: redis.Redis
) -> None:
    """Both ways take about as long. A job that may turn out to be another one, or to be blocked, waits for its row."""
    with connect(str(settings.database_url)) as other, ThreadPoolExecutor(3) as threads:
        other.execute("BEGIN; LOCK TABLE jobs IN SHARE MODE")
        plain = threads.submit(client.submit, model="echo", prompt="hello")
        held_back = [threads.submit(client.submit, model="echo", messages=HELLO, **more) for more in _HOLDING_BACK]
        wait_until(lambda: tables.value(_BLOCKED) == 3, PATIENCE_SECONDS, "all wait for the table")
        [message] = wait_until(lambda: interactive(broker, settings), PATIENCE_SECONDS, "one message is there")
        assert tables.value("SELECT count(*) FROM jobs") == 0
        other.execute("COMMIT")
        assert message["id"] == str(plain.result().id)
        ids = {str(one.result().id) for one in [plain, *held_back]}
        assert {message["id"] for message in interactive(broker, settings)} == ids


_HOLDING_BACK: list[dict[str, Any]] = [{"idempotency_key": "k"}, {"conversation": "c"}]
_BLOCKED = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


def test_submit_again_with_the_same_key(client: Producer, settings: Settings, broker: redis.Redis) -> None:
    """The same key and request give the same job and no second message; another request is a conflict."""
    first = client.submit(model="echo", prompt="hello", idempotency_key="k")
    assert client.submit(model="echo", prompt="hello", idempotency_key="k").id == first.id
    assert len(interactive(broker, settings)) == 1
    with pytest.raises(IdempotencyConflict):
        client.submit(model="echo", prompt="hello", idempotency_key="k", n=2)


def test_only_a_turn_that_may_run_is_published(
    client: Producer, settings: Settings, tables: Tables, broker: redis.Redis
) -> None:
    """A blocked turn has no message; whoever cancels the one before publishes it."""
    first = client.submit(model="echo", messages=HELLO, conversation="c")
    second = client.submit(model="echo", messages=HELLO, conversation="c")
    assert (second.state, second.turn) == (State.BLOCKED, 2)
    assert [message["id"] for message in interactive(broker, settings)] == [str(first.id)]
    client.cancel(first.id)
    assert {message["id"] for message in interactive(broker, settings)} == {str(first.id), str(second.id)}


# == without a broker ===========================================================================================


@contextmanager
def deaf_port(*, silent: bool) -> Iterator[int]:
    """A port that refuses connections, or one that takes them and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen(64)
        yield listener.getsockname()[1]


@pytest.mark.parametrize("silent", [False, True], ids=["down", "silent"])
def test_submit_without_redis(silent: bool, settings: Settings, tables: Tables) -> None:  # noqa: FBT001
    """A broker that refuses or never answers costs a submit a bounded wait: the row is safe and unpublished."""
    with deaf_port(silent=silent) as port:
        cut_off = settings.model_copy(update={"broker_url": f"redis://:p@127.0.0.1:{port}/0"})
        with Producer(cut_off) as client:
            before = time.monotonic()
            made = [client.submit(model="echo", prompt=f"hello {number}") for number in range(3)]
            assert time.monotonic() - before < BOUND_SECONDS
    for job in made:
        row = tables.job(job.id)
        assert (row["state"], row["published_at"]) == ("queued", None)


def test_wait_and_cancel_without_redis(settings: Settings) -> None:
    """Without announcements a waiting call finds out by looking, and a cancel is a cancel."""
    with deaf_port(silent=False) as port, ThreadPoolExecutor(1) as pool:
        cut_off = settings.model_copy(update={"broker_url": f"redis://:p@127.0.0.1:{port}/0"})
        with Producer(cut_off) as client:
            job = client.submit(model="echo", prompt="hello")
            waiting = pool.submit(client.wait, job.id, PATIENCE_SECONDS)
            assert client.cancel(job.id).state is State.CANCELLED
            assert waiting.result().state is State.CANCELLED


def test_the_sweeper_publishes_what_a_submit_could_not(
    client: Producer, settings: Settings, tables: Tables, broker: redis.Redis
) -> None:
    """A job accepted while Redis was away gets its message from the next sweep."""
    with deaf_port(silent=False) as port:
        cut_off = settings.model_copy(update={"broker_url": f"redis://:p@127.0.0.1:{port}/0"})
        with Producer(cut_off) as lonely:
            job = lonely.submit(model="echo", prompt="hello")
    assert interactive(broker, settings) == []
    tables.move_back(job.id, "run_after", 3)
    swept = client.store.sweep([])
    assert swept is not None
    assert client.dispatcher.publish(swept.to_publish, PATIENCE_SECONDS)
    assert [message["id"] for message in interactive(broker, settings)] == [str(job.id)]


# == without Postgres ===========================================================================================


def test_submit_without_postgres(own_servers: Servers, settings: Settings) -> None:
    """Postgres away is an error within the time that was set; repeated under the same id once it is back, one job."""
    upgrade(own_servers.database_url)
    urls = {
        "database_url": own_servers.database_url,
        "broker_url": own_servers.broker_url,
        "secret": own_servers.secret,
    }
    job_id = new_id()
    with Producer(settings.model_copy(update=urls | {"store_wait_seconds": 1.0})) as client:
        client.submit(model="echo", prompt="before")
        own_servers.postgres.stop()
        for call in (
            lambda: client.submit(job_id=job_id, model="echo", prompt="hello"),
            lambda: client.get(job_id),
            lambda: client.submit_many([{"model": "echo", "prompt": "hello"}]),
        ):
            with pytest.raises(StoreUnavailable, match="Postgres"):
                call()
        own_servers.postgres.start()
        assert client.submit(job_id=job_id, model="echo", prompt="hello").id == job_id
        assert client.submit(job_id=job_id, model="echo", prompt="hello").id == job_id
        assert len(client.list()) == 2


def test_without_addresses(settings: Settings) -> None:
    """A producer without a stack says how to get one, and which settings would name other servers."""
    bare = settings.model_copy(update={"database_url": None, "broker_url": None, "secret": None})
    with pytest.raises(NoStack, match=r"headrace up.*HEADRACE_DATABASE_URL"):
        Producer(bare)


# == get, wait, cancel, list ====================================================================================


def test_wait(
    client: Producer, worker: Worker, announce: Callable[[Job], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiting call is woken by the announcement, however the job ended, and gives the job with its end."""
    # So that nothing but the announcement can wake it.
    monkeypatch.setattr(producer.client, "_LOOK_WITH_SIGNALS_SECONDS", 1000.0)
    for outcome in ("succeeded", "failed", "cancelled", "expired"):
        job = client.submit(model="echo", prompt="hello")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.wait, job.id, 2 * PATIENCE_SECONDS)
            wait_until(lambda: client._ears.ready, PATIENCE_SECONDS, "the call listens")
            claim = worker.run(job.id, outcome)
            assert announce(job)
            ended = waiting.result()
        assert (ended.id, ended.state) == (job.id, State(outcome))
        assert ended.text == (str(claim.token) if outcome == "succeeded" else "")
        assert client.get(job.id) == ended


def test_wait_for_many(client: Producer, worker: Worker, announce: Callable[[Job], bool]) -> None:
    """Many calls wait side by side, two of them for the same job, and leave nothing behind."""
    made = [client.submit(model="echo", prompt=f"{number}") for number in range(4)]
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(client.wait, job.id, PATIENCE_SECONDS) for job in [*made, *made]]
        for job in reversed(made):
            worker.run(job.id)
            announce(job)
        assert [one.result().id for one in waiting] == [job.id for job in [*made, *made]]
    assert client._ears._waiting == {}


def test_wait_for_an_ended_job(client: Producer, worker: Worker) -> None:
    """Nothing has to be awaited."""
    job = client.submit(model="echo", prompt="hello")
    worker.run(job.id)
    assert client.wait(job.id, 0.0).state is State.SUCCEEDED


def test_wait_times_out(client: Producer) -> None:
    """The waiting ends, the job goes on."""
    job = client.submit(model="echo", prompt="hello")
    with pytest.raises(WaitTimeout, match=str(job.id)):
        client.wait(job.id, 0.05)
    assert client.get(job.id).state is State.QUEUED


def test_unknown_job(client: Producer) -> None:
    """There is no such job to get, to await or to cancel."""
    for call in (client.get, client.wait, client.cancel):
        with pytest.raises(NotFound):
            call(uuid4())


def test_cancel_of_a_waiting_job(client: Producer) -> None:
    """It ends at once, and who waits for it is woken."""
    job = client.submit(model="echo", prompt="hello")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait, job.id, PATIENCE_SECONDS)
        cancelled = client.cancel(job.id)
        assert waiting.result() == cancelled
    assert cancelled.state is State.CANCELLED
    assert cancelled.cost is not None
    assert cancelled.cost.busy_seconds == 0
    assert client.cancel(job.id) == cancelled


def test_cancel_of_a_running_job(client: Producer, worker: Worker, settings: Settings, broker: redis.Redis) -> None:
    """Its worker is told through Redis, and in the row, which it reads at its next heartbeat."""
    job = client.submit(model="echo", prompt="hello")
    claim = worker.claim(job.id)
    with broker.pubsub(ignore_subscribe_messages=True) as ears:  # type: ignore[no-untyped-call]
        ears.subscribe(f"{settings.key_prefix}:cancel")
        ears.get_message(timeout=PATIENCE_SECONDS)
        running = client.cancel(job.id)
        heard = wait_until(lambda: ears.get_message(timeout=1.0), PATIENCE_SECONDS, "the cancel is announced")
    assert (running.state, running.cancel_requested_at is not None) == (State.RUNNING, True)
    assert heard["data"].startswith(str(job.id).encode())
    assert worker.renew([claim.token]).cancelled == (claim.token,)


def test_list(client: Producer, worker: Worker) -> None:
    """Filters and pages, newest first."""
    made = [client.submit(model="echo", prompt=f"{number}") for number in range(5)]
    turn = client.submit(model="echo", messages=HELLO, conversation="c")
    worker.run(made[0].id)
    newest_first = [turn.id, *(job.id for job in reversed(made))]
    assert [job.id for job in client.list()] == newest_first
    assert [job.id for job in client.list(limit=2)] == newest_first[:2]
    assert [job.id for job in client.list(before=newest_first[1], limit=2)] == newest_first[2:4]
    assert [job.id for job in client.list(states=[State.SUCCEEDED])] == [made[0].id]
    assert [job.id for job in client.list(conversation="c")] == [turn.id]
    assert client.list(model="tiny-chat") == []


def test_tenants(settings: Settings, client: Producer) -> None:
    """Another tenant's producer does not know the job."""
    job = client.submit(model="echo", prompt="hello")
    with Producer(settings, tenant_id="other") as stranger:
        assert stranger.list() == []
        for call in (stranger.get, stranger.cancel):
            with pytest.raises(NotFound):
                call(job.id)


# == submit_many ================================================================================================


def test_submit_many(client: Producer, worker: Worker, settings: Settings, broker: redis.Redis) -> None:
    """Many jobs at once: one batch in the bulk lane, in the order asked, and one hint for the route."""
    made = client.submit_many({"model": "echo", "prompt": f"{number}", "priority": number % 3} for number in range(20))
    assert len({job.batch_id for job in made}) == 1
    assert {(job.lane, job.state) for job in made} == {(Lane.BULK, State.QUEUED)}
    [hint] = messages(broker, settings, queue_name("echo", Lane.BULK))
    assert (hint["task"], hint["arguments"][0]) == (DRAIN, "echo")
    assert MessageSigner(SECRET).knows(hint["arguments"][1], DRAIN, "echo")
    for claim in worker.claim_bulk(50):
        worker.settle(claim, served_by=str(claim.request.prompt))
    assert [client.wait(job.id, PATIENCE_SECONDS).served_by for job in made] == [f"{number}" for number in range(20)]


def test_submit_many_all_or_none(client: Producer, tables: Tables) -> None:
    """One bad request among good ones refuses them all, and is named by its place."""
    good = {"model": "echo", "prompt": "hello"}
    with pytest.raises(RequestInvalid) as refused:
        client.submit_many([good, good, good | {"temperature": 3}, good])
    assert refused.value.field == "requests[2].temperature"
    assert tables.count("jobs") == tables.count("batches") == 0


@pytest.mark.parametrize("alone", [{"idempotency_key": "k"}, {"conversation": "c", "prompt": None, "messages": HELLO}])
def test_what_submit_many_does_not_take(alone: dict[str, Any], client: Producer, tables: Tables) -> None:
    """Keys and conversations are for single jobs."""
    with pytest.raises(RequestInvalid) as refused:
        client.submit_many([{"model": "echo", "prompt": "hello"} | alone])
    assert refused.value.field == f"requests[0].{next(iter(alone))}"
    assert tables.count("jobs") == 0


def test_submit_many_of_nothing(client: Producer) -> None:
    """Nothing asked, nothing done."""
    assert client.submit_many([]) == []


# == bad input ==================================================================================================

LONE = "half a pair: \ud83d"
BAD_INPUT = [
    ("empty prompt", {"prompt": ""}, "prompt"),
    ("empty messages", {"messages": []}, "messages"),
    ("empty content", {"messages": [{"role": "user", "content": ""}]}, "messages"),
    ("no input", {}, "messages"),
    ("unknown model", {"model": "no-such-model", "prompt": "hello"}, "model"),
    ("model of control characters", {"model": "a\x00b", "prompt": "hello"}, "model"),
    ("max_tokens 0", {"prompt": "hello", "max_tokens": 0}, "max_tokens"),
    ("max_tokens above the context", {"prompt": "hello", "max_tokens": 1_000_000}, "max_tokens"),
    ("temperature 3", {"prompt": "hello", "temperature": 3}, "temperature"),
    ("unknown field", {"prompt": "hello", "temprature": 1}, "temprature"),
    ("prompt of 2 MB", {"prompt": "x" * 2_000_000}, "prompt"),
    ("messages of 2 MB", {"messages": [{"role": "user", "content": "x" * 2_000_000}]}, "messages"),
    ("invalid UTF-8 in a prompt", {"prompt": b"\xff\xfe"}, "prompt"),
    ("invalid UTF-8 in a message", {"messages": [{"role": "user", "content": b"\xff"}]}, "messages[0].content"),
    ("lone surrogate in a prompt", {"prompt": LONE}, "prompt"),
    ("lone surrogate in a message", {"messages": [{"role": "user", "content": LONE}]}, "messages[0].content"),
    ("no user message", {"messages": [{"role": "system", "content": "be brief"}]}, "messages"),
]


@pytest.mark.parametrize(("fields", "field"), [case[1:] for case in BAD_INPUT], ids=[case[0] for case in BAD_INPUT])
def test_bad_input(fields: dict[str, Any], field: str, client: Producer, tables: Tables) -> None:
    """A bad request is one error that names the field and fits on a screen, and leaves nothing behind."""
    with pytest.raises(RequestInvalid) as refused:
        client.submit(**{"model": "echo", "conversation": None} | fields)
    assert refused.value.field == field
    assert len(str(refused.value)) < 500
    for table in ("jobs", "payloads", "conversations", "batches"):
        assert tables.count(table) == 0


def test_unknown_model_names_the_known(client: Producer) -> None:
    """Who misspells a model reads which there are."""
    with pytest.raises(ModelUnknown, match="echo") as refused:
        client.submit(model="ecko", prompt="hello")
    assert refused.value.code == "model_not_found"


def test_a_prompt_as_long_as_is_accepted(settings: Settings, tables: Tables) -> None:
    """At the limit, in bytes of UTF-8, a prompt is accepted and kept whole; one byte more is refused by the limit."""
    longest = "\U0001f600" * 250
    with Producer(settings.model_copy(update={"max_prompt_bytes": 1000})) as client:
        job = client.submit(model="echo", prompt=longest)
        assert Worker.hire(client.database).claim(job.id).request.prompt == longest
        with pytest.raises(RequestInvalid, match="HEADRACE_MAX_PROMPT_BYTES"):
            client.submit(model="echo", prompt=longest + ".")
    assert tables.count("jobs") == 1


# -- on behalf of others ------------------------------------------------------------------------------------------


def test_a_producer_acts_for_other_tenants_over_the_same_connections(client: Producer) -> None:
    """Each sees its own jobs alone, and to close one of them closes nothing of the others."""
    acme, zeta = client.for_tenant("acme"), client.for_tenant("zeta")
    job = acme.submit(model="echo", prompt="hello")
    acme.close()
    assert acme.get(job.id).tenant_id == "acme"
    for other in (client, zeta):
        with pytest.raises(NotFound):
            other.get(job.id)
        with pytest.raises(NotFound):
            other.cancel(job.id)
        assert other.list() == []
    assert acme.database is client.database


def test_a_producer_for_a_key_keeps_to_its_models(client: Producer) -> None:
    """What the key is not for is refused before there is a row, alone or among many."""
    acme = client.for_key(ApiKey(new_id(), "acme", models=("echo",)))
    assert acme.submit(model="echo", prompt="hello").tenant_id == "acme"
    with pytest.raises(Forbidden):
        acme.submit(model="tiny-chat", prompt="hello")
    with pytest.raises(Forbidden):
        acme.submit_many([{"model": "echo", "prompt": "a"}, {"model": "tiny-chat", "prompt": "b"}])
    assert len(acme.list()) == 1


# -- forged signals -----------------------------------------------------------------------------------------------


def test_signals_that_none_of_us_signed_are_refused_and_counted(settings: Settings, broker: redis.Redis) -> None:
    """Altered, made for another kind, unsigned or no text: nobody is told, and what comes after is heard."""
    heard: list[UUID] = []
    stop, ready = threading.Event(), threading.Event()
    wanted, other = new_id(), new_id()
    sign = MessageSigner(SECRET).sign
    with closing(Signals(settings)) as signals:
        ears = threading.Thread(target=signals.listen, args=(CANCEL, heard.append, stop, ready))
        ears.start()
        try:
            assert ready.wait(PATIENCE_SECONDS)
            forgeries = [
                str(other),
                f"{other}:",
                f"{other}:{'0' * 64}",
                f"{other}:{sign(CANCEL, str(wanted))}",
                f"{other}:{sign(ENDED, str(other))}",
                f"{other}:{sign(CANCEL, str(other)).upper()}",
                b"\xff\xfe",
                "",
            ]
            for forgery in forgeries:
                broker.publish(f"{settings.key_prefix}:{CANCEL}", forgery)
            signals.publish(CANCEL, [wanted])
            wait_until(lambda: heard, PATIENCE_SECONDS, "the one that is signed is heard")
        finally:
            stop.set()
            ears.join()
        assert heard == [wanted]
        assert signals.signer.refused == len(forgeries)


# -- policy -------------------------------------------------------------------------------------------------------


def test_what_a_policy_did_is_recorded_on_the_job(settings: Settings, tables: Tables) -> None:
    """Alone or in a batch: what is redacted is in no table, and the job says which rule did it."""
    rules = {
        "acme": {
            "secrets": {"pattern": "hunter[0-9]", "action": "redact"},
            "short": {"pattern": "^.{1,20}$", "action": "flag"},
        }
    }
    with Producer(settings.model_copy(update={"policies": rules})) as producer:
        acme = producer.for_tenant("acme")
        one = acme.submit(model="echo", prompt="my hunter2")
        [many] = acme.submit_many([{"model": "echo", "prompt": "my hunter2"}])
        for job in (one, acme.get(one.id), many):
            assert job.policy == {"secrets": "redact", "short": "flag"}
        assert producer.get(producer.submit(model="echo", prompt="my hunter2").id).policy == {}
    stored = tables.rows("SELECT request::text AS request FROM payloads WHERE tenant_id = 'acme'")
    assert len(stored) == 2
    assert all("hunter2" not in row["request"] for row in stored)
