"""Messages to workers, through Celery. A message is a hint: the row in Postgres is the truth.

Interactive: the message names one job, and its task id is the job's id. Bulk: it says that a route has rows. Each is
signed, and says nothing else: what is asked and answered does not pass through Redis.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, TypeAlias
from uuid import UUID

import redis
from celery import Celery
from celery.app.control import Control
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.messaging import Producer

from jobs.errors import StoreUnavailable
from jobs.ids import new_id
from jobs.settings import Settings
from jobs.signing import MessageSigner
from jobs.states import Lane
from jobs.store import Waiting

log = logging.getLogger(__name__)

Sending: TypeAlias = Future[bool] | None  # None: nobody waits for a broker that just failed

RUN_JOB = "headrace.run_job"
DRAIN = "headrace.drain"
REVOKE = "revoke"
PROVE = "headrace.prove"

# After a broker failure nobody waits for it again for this long; the sweeper publishes what was left.
_BREAK_SECONDS = 2.0
# Shorter than a worker's, because whoever closes waits for the last message's fate (measured with a silent broker:
# 3.6 s instead of 11.6 s, redis-py tries more than once).
_SOCKET_SECONDS = 1.0
# Kombu wraps what fails while it connects; what fails later comes as the driver raised it.
_UNREACHABLE = (OSError, OperationalError, redis.RedisError)
# That a message went out is noted this much later, for all that went out meanwhile: most rows have started by then and
# need no note, and none is written to while its worker claims it. Less than `REPUBLISH_SECONDS`.
_NOTE_SECONDS = 0.5
# A worker's queue of messages to itself goes this long after the last one.
_PROOFS_KEPT_SECONDS = 60
# Kombu's Redis transport folds priorities 0-9 into these steps, each a list of its own.
_PRIORITY_STEPS = [0, 3, 6, 9]


def queue_name(model: str, lane: Lane) -> str:
    """The Celery queue of one lane of a model's route."""
    return f"{model}.{lane}"


def celery_app(settings: Settings) -> Celery:
    """The Celery application that producers send with and workers run; nothing but JSON passes.

    Timeouts are short because a silent peer is found by them alone (measured: a worker with Celery's defaults does
    not consume again within 120 s, with these after 7 s).
    """
    app = Celery("headrace", broker=settings.broker_url, set_as_current=False, control=_control(signer_of(settings)))
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_acks_late=False,
        task_ignore_result=True,
        result_backend=None,
        task_default_queue="headrace.unrouted",
        task_send_sent_event=False,
        worker_pool="threads",
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": f"{settings.key_prefix}:",
            "queue_order_strategy": "priority",
            "priority_steps": _PRIORITY_STEPS,
            "socket_timeout": 2,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 2,
            "visibility_timeout": 300,
        },
    )
    return app


def signer_of(settings: Settings) -> MessageSigner:
    """Who signs our messages, and knows them again."""
    assert settings.secret is not None
    return MessageSigner(settings.secret)


def _control(signer: MessageSigner) -> type[Control]:
    """Celery's remote control, whose revoke is signed: with it Flower cancels jobs."""

    class Signed(Control):  # type: ignore[misc]
        def broadcast(self, command: str, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
            if command == REVOKE and arguments is not None:
                arguments = arguments | {"signature": signer.sign(REVOKE, revoked_text(arguments["task_id"]))}
            return super().broadcast(command, arguments, **options)

    return Signed


def revoked_text(task_id: Any) -> str:
    """What is signed of a revoke: one task's id, or several."""
    return " ".join(map(str, task_id)) if isinstance(task_id, list | tuple) else str(task_id)


def proof_queue_name(model: str, worker_id: UUID) -> str:
    """The queue of what one worker sends to itself."""
    return f"{model}.proof-{worker_id.hex[-12:]}"


class Dispatcher:
    """Sends messages from one thread of its own, so that a silent broker costs its caller a bounded wait."""

    def __init__(self, settings: Settings, mark_published: Callable[[Sequence[Waiting]], None]) -> None:
        self._app = celery_app(settings)
        self._signer = signer_of(settings)
        timeouts = {"socket_timeout": _SOCKET_SECONDS, "socket_connect_timeout": _SOCKET_SECONDS}
        self._app.conf.broker_transport_options |= timeouts
        self._wait_seconds = settings.submit_broker_wait_seconds
        self._mark_published = mark_published
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dispatch")
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._broken_until = 0.0
        self._sent: list[Waiting] = []
        self._sent_lock = threading.Lock()
        self._noting: threading.Timer | None = None

    def publish(self, jobs: Sequence[Waiting], wait_seconds: float | None = None) -> bool:
        """Send one message per job. False: not within the time; the rows are safe and will be published later."""
        return self.finish(self.begin(jobs), wait_seconds)

    def begin(self, jobs: Sequence[Waiting]) -> Sending:
        """Send one message per job meanwhile; `finish` says what came of it."""
        return self._begin(lambda: self._send_jobs(jobs))

    def finish(self, sending: Sending, wait_seconds: float | None = None) -> bool:
        """Wait for what was begun. False: not within the time, as `publish`."""
        if sending is None:
            return False
        wait = self._wait_seconds if wait_seconds is None else wait_seconds
        try:
            return sending.result(wait)
        except FutureTimeoutError:
            self._broken_until = time.monotonic() + _BREAK_SECONDS
            log.warning("the broker did not answer within %g s; the sweeper will publish", wait)
            return False

    def hint_bulk(self, model: str, wait_seconds: float | None = None) -> bool:
        """Say that the model's route has bulk rows."""
        queue = queue_name(model, Lane.BULK)
        return self._bounded(lambda: self._send(DRAIN, model, str(new_id()), queue), wait_seconds)

    def prove(self, queue: str) -> bool:
        """Send a worker a message that asks for nothing, in a queue that goes when nobody sends any more."""
        return self._bounded(lambda: self._send_proof(queue), None)

    def depth(self, model: str, lane: Lane, wait_seconds: float | None = None) -> int | None:
        """Messages in a queue; None if the broker did not say."""
        depths: list[int] = []
        answered = self._bounded(lambda: depths.append(self._depth(queue_name(model, lane))), wait_seconds)
        return depths[0] if answered and depths else None

    def close(self) -> None:
        """Note what was sent, and let go of the broker."""
        self._thread.shutdown(wait=True)
        self._drop()
        if self._noting is not None:
            self._noting.cancel()
            self._noting.join()
        self._note_sent()

    # -- in the thread ------------------------------------------------------------------------------------------

    def _bounded(self, work: Callable[[], None], wait_seconds: float | None) -> bool:
        return self.finish(self._begin(work), wait_seconds)

    def _begin(self, work: Callable[[], None]) -> Sending:
        return None if time.monotonic() < self._broken_until else self._thread.submit(self._guarded, work)

    def _guarded(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except _UNREACHABLE as error:
            self._broken_until = time.monotonic() + _BREAK_SECONDS
            log.warning("the broker failed: %s; the sweeper will publish", error)
            self._drop()
            return False
        return True

    def _send_jobs(self, jobs: Sequence[Waiting]) -> None:
        for job in jobs:
            queue = queue_name(job.model, Lane.INTERACTIVE)
            self._send(RUN_JOB, str(job.id), str(job.id), queue, job.priority)
        with self._sent_lock:
            first = not self._sent
            self._sent += jobs
        if first:
            self._noting = threading.Timer(_NOTE_SECONDS, self._note_sent)
            self._noting.daemon = True
            self._noting.start()

    # -- after it -----------------------------------------------------------------------------------------------

    def _note_sent(self) -> None:
        with self._sent_lock:
            sent, self._sent = self._sent, []
        try:
            if sent:
                self._mark_published(sent)
        except StoreUnavailable:
            log.warning("could not note %d published jobs; they may be published again", len(sent))

    def _send(self, task: str, subject: str, task_id: str, queue: str, priority: int = 0) -> None:
        args = (subject, self._signer.sign(task, subject))
        # Flower shows what a message is about, not its signature.
        shown = f"({subject!r},)"
        message = self._app.amqp.as_task_v2(task_id, task, args, {}, argsrepr=shown, ignore_result=True)
        # The nameless exchange delivers by queue name: it needs no binding in Redis, which a flush would lose.
        self._open().publish(
            message.body,
            exchange="",
            routing_key=queue,
            serializer="json",
            headers=message.headers,
            priority=priority,
            **message.properties,
        )

    def _send_proof(self, queue: str) -> None:
        self._send(PROVE, queue, str(new_id()), queue)
        self._open().channel.client.pexpire(queue, 1000 * _PROOFS_KEPT_SECONDS)

    def _depth(self, queue: str) -> int:
        # The AMQP way, a passive declare, raises on a Redis queue that is empty.
        return int(self._open().channel._size(queue))  # noqa: SLF001

    def _open(self) -> Producer:
        if self._producer is None:
            self._connection = self._app.connection_for_write()
            channel = self._connection.channel()
            # Kombu makes a new redis-py client for each message, which takes longer than sending it.
            channel._create_client = functools.cache(channel._create_client)  # noqa: SLF001
            self._producer = Producer(channel)
        return self._producer

    def _drop(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            with suppress(*_UNREACHABLE):
                connection.release()
