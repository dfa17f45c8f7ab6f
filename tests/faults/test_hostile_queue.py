"""What anybody can push into Redis, and what can get lost on the way into it: every job runs, and runs once."""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import redis

from jobs.dispatch import RUN_JOB
from jobs.errors import NotFound
from jobs.ids import new_id
from jobs.schema import Job
from jobs.states import Lane, State
from jobs.store import Waiting
from kit.invariants import Witness
from kit.recovery import Recovery
from kit.systems import PATIENCE_SECONDS, THREADS, System
from kit.waiting import wait_until
from kit.workers import WorkerProcesses

PROMPT = "0123456789" * 3  # six tenths of a second of the slow engine
LONG = PROMPT * 10
_YAML = "application/x-yaml"
_PICKLE = "application/x-python-serialize"


@pytest.fixture(scope="module")
def steady(new_system: Callable[..., System]) -> System:
    """A system with one worker, which consumes."""
    system = new_system(lease_seconds=10.0)
    system.start("slow")
    system.wait(system.producer.submit(model="slow", prompt="x").id)
    return system


@pytest.fixture
def worker(steady: System) -> WorkerProcesses:
    """That worker."""
    return steady.workers[0]


class _Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_garbage_in_the_queue_ends_nothing_and_is_not_unpickled(
    steady: System, worker: WorkerProcesses, tmp_path: Path
) -> None:
    """Whatever cannot be read, or is not for us, is dropped: the consumer lives, jobs run on, the next one starts."""
    consumer, identity, bomb = worker.consumer, worker.await_ready().id, tmp_path / "unpickled"
    with Witness(steady) as witness:
        [running] = steady.producer.submit_many([{"model": "slow", "prompt": LONG}])
        wait_until(lambda: worker.has_begun(running.id), PATIENCE_SECONDS, "a job runs")
        for name, item in _garbage(bomb).items():
            with Recovery(f"garbage ({name})", within_seconds=3):
                _push(steady, item)
                job = steady.producer.submit(model="slow", prompt="x")
                assert steady.wait(job.id).state is State.SUCCEEDED
            witness.saw(job)
        witness.saw(running)
        witness.check()

    assert not bomb.exists()
    assert (worker.consumer, worker.await_ready().id) == (consumer, identity)
    assert steady.tables.outcomes(running.id) == ["succeeded"]


def test_garbage_on_the_channel_of_remote_control_ends_nothing(steady: System, worker: WorkerProcesses) -> None:
    """Celery listens there for commands; what is none is dropped too."""
    consumer = worker.consumer
    with redis.Redis.from_url(str(steady.settings.broker_url)) as client:
        for item in (b"{", b"[]", b"17", b'{"body": "x"}', b"\xff"):
            assert client.publish(_prefix(steady) + b":/0.celery.pidbox", item) > 0, "nobody listens there"
    assert steady.wait(steady.producer.submit(model="slow", prompt="x").id).state is State.SUCCEEDED
    assert worker.consumer == consumer


def test_the_job_behind_a_message_that_was_spoilt_still_ends(steady: System, worker: WorkerProcesses) -> None:
    """Its own message is cut short in the queue: the row waits, its queue is empty, it is sent again."""
    with Recovery("a spoilt message", within_seconds=30):
        # Nobody fetches while every thread has a job.
        busy = [steady.producer.submit(model="slow", prompt=PROMPT) for _ in range(THREADS)]
        job = steady.producer.submit(model="slow", prompt="x")
        with redis.Redis.from_url(str(steady.settings.broker_url)) as client:
            queue, message = wait_until(lambda: _popped(client, steady), PATIENCE_SECONDS, "its message waits")
            client.lpush(queue, message[: len(message) // 2])
        assert {steady.wait(one.id).state for one in [*busy, job]} == {State.SUCCEEDED}


def test_a_message_delivered_a_hundred_times_is_one_execution(steady: System, worker: WorkerProcesses) -> None:
    """Copies before the job runs, while it runs, after its end, and after a retry change nothing."""
    with Witness(steady) as witness:
        job = steady.producer.submit(model="slow", prompt=PROMPT)
        _deliver(steady, job, 50)
        done = steady.wait(job.id)
        _deliver(steady, job, 50)
        wait_until(lambda: steady.producer.dispatcher.depth("slow", Lane.INTERACTIVE, 5.0) == 0, 60, "all were taken")
        witness.saw(job, after := steady.producer.submit(model="slow", prompt="x"))
        steady.wait(after.id)
        witness.check()

    assert [one.job_id for one in worker.executions()].count(job.id) == 1
    assert steady.producer.get(job.id) == done
    assert steady.tables.outcomes(job.id) == ["succeeded"]


def test_a_producer_killed_between_commit_and_message_costs_seconds(steady: System) -> None:
    """The row is there, no message ever was: the sweeper sends one."""
    job_id = new_id()
    _kill_producer(steady, "dispatcher.begin", job_id, key="killed")  # with a key it is sent after the commit
    with Recovery("a producer killed between commit and publish", within_seconds=5):
        job = steady.wait(job_id)
    assert job.state is State.SUCCEEDED


def test_a_producer_killed_between_message_and_commit_leaves_nothing(steady: System, worker: WorkerProcesses) -> None:
    """The message goes out first, for a row that never comes: the worker looks for it a moment, and goes on."""
    job_id = new_id()
    with Witness(steady) as witness:
        _kill_producer(steady, "store.accept", job_id)
        wait_until(lambda: steady.producer.dispatcher.depth("slow", Lane.INTERACTIVE, 5.0) == 0, 60, "it was taken")
        witness.saw(after := steady.producer.submit(model="slow", prompt="x"))
        assert steady.wait(after.id).state is State.SUCCEEDED
        witness.check()
    with pytest.raises(NotFound):
        steady.producer.get(job_id)
    assert job_id not in {one.job_id for one in worker.executions()}


# == helpers =====================================================================================================

_KILLED_PRODUCER = """
import os, signal, uuid
from jobs.settings import Settings
from jobs.states import Lane
from producer.client import Producer

producer = Producer(Settings.load())

def kill(*_, **__):
    producer.dispatcher.depth("slow", Lane.INTERACTIVE, 10.0)  # once what was begun has been sent
    os.kill(os.getpid(), signal.SIGKILL)

producer.{moment} = kill
producer.submit(model="slow", prompt="x", job_id=uuid.UUID("{job_id}"), idempotency_key={key!r})
"""


def _kill_producer(system: System, moment: str, job_id: UUID, key: str | None = None) -> None:
    """While it submits this job, instead of that call."""
    code = _KILLED_PRODUCER.format(moment=moment, job_id=job_id, key=key)
    child = subprocess.run([sys.executable, "-c", code], env=_inherited() | system.settings.environment(), check=False)
    assert child.returncode == -signal.SIGKILL


def _garbage(bomb: Path) -> dict[str, bytes]:
    pickled = base64.b64encode(pickle.dumps(_Bomb(bomb))).decode()
    good = _message(json.dumps([[str(new_id())], {}, {}]))
    return {
        "truncated JSON": json.dumps(good).encode()[:100],
        "no text": b"\xff\xfe\x00",
        "no message": b"[1, 2]",
        "an empty object": b"{}",
        "no headers": json.dumps(good | {"headers": None}).encode(),
        "a body that is no base64": json.dumps(good | {"body": "x"}).encode(),
        "pickle": json.dumps(_message(pickled, _PICKLE, encoded=True)).encode(),
        "pickle of the first protocol": json.dumps(_message(pickled, _PICKLE, encoded=True) | {"headers": {}}).encode(),
        "yaml": json.dumps(_message("!!python/object/apply:os.abort []", _YAML)).encode(),
        "10 MB": json.dumps(_message("x" * 10_000_000)).encode(),
        "10 MB, cut short": json.dumps(_message("x" * 10_000_000)).encode()[:-1],
        "an unknown task": json.dumps(_message("[[], {}, {}]", task="headrace.of_tomorrow")).encode(),
        "a later version": json.dumps(
            _message(json.dumps([[{"id": str(new_id()), "version": 2}, 2], {}, {}]))
        ).encode(),
        "an id that is none": json.dumps(_message(json.dumps([["not-an-id"], {}, {}]))).encode(),
    }


def _message(
    body: str, content_type: str = "application/json", *, encoded: bool = False, task: str = RUN_JOB
) -> dict[str, Any]:
    """As kombu writes it into a Redis list; `encoded`: the body is base64 already."""
    task_id = str(new_id())
    return {
        "body": body if encoded else base64.b64encode(body.encode()).decode(),
        "content-encoding": "binary" if encoded else "utf-8",
        "content-type": content_type,
        "headers": {"lang": "py", "task": task, "id": task_id, "root_id": task_id, "argsrepr": "", "kwargsrepr": ""},
        "properties": {
            "correlation_id": task_id,
            "delivery_info": {"exchange": "", "routing_key": "slow.interactive"},
            "delivery_tag": str(new_id()),
            "body_encoding": "base64",
            "priority": 0,
        },
    }


def _prefix(system: System) -> bytes:
    return system.settings.key_prefix.encode()


def _push(system: System, item: bytes) -> None:
    with redis.Redis.from_url(str(system.settings.broker_url)) as client:
        client.lpush(_prefix(system) + b":slow.interactive", item)


def _popped(client: redis.Redis, system: System) -> tuple[bytes, bytes] | None:
    """A message that waits, taken out, and the list that it was in."""
    for queue in client.scan_iter(_prefix(system) + b":slow.interactive*"):
        if message := client.rpop(queue):
            return queue, message
    return None


def _deliver(system: System, job: Job, times: int) -> None:
    copies = [Waiting(job.id, job.model, job.priority)] * times
    assert system.producer.dispatcher.publish(copies, PATIENCE_SECONDS)


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
