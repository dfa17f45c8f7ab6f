"""The Celery process of a worker: `python -m workers.consumer --socket PATH --spec JSON [--health FOLDER]`.

Claims, leases and results; I/O only. It ends with its supervisor, whose pipe is its standard input.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import celery.apps.worker
from celery import Celery, bootsteps, signals
from celery.exceptions import Ignore
from celery.worker.control import Panel
from kombu.entity import Exchange, Queue

from jobs.dispatch import (
    DRAIN,
    PROVE,
    REVOKE,
    RUN_JOB,
    celery_app,
    proof_queue_name,
    queue_name,
    revoked_text,
)
from jobs.errors import NotFound
from jobs.logs import JsonLines, set_up_logging
from jobs.settings import Settings
from jobs.signing import MessageSigner
from jobs.states import Lane
from models.catalog import ModelSpec
from workers import tasks
from workers.health import HealthFolder
from workers.host import Host
from workers.loops import Loop
from workers.proof import ConsumptionProof
from workers.transport import Connection, Transport

log = logging.getLogger(__name__)

# Threads wait for the engine; a few more than its slots so that one always looks for what comes next.
SPARE_THREADS = 8
# The collector looks when so many objects more are alive than when it last looked: its usual 700 are a few jobs.
_GARBAGE_OBJECTS = 50_000
# How late Flower may hear of a task.
_EVENTS_SECONDS = 0.2
# Measured: 0.1 s with a broker that answers.
_CELERY_END_SECONDS = 5.0
# Unsigned commands of Celery's remote control that would stop a worker or change what it consumes. Looks stay.
_COMMANDS_TAKEN_OUT = (
    "add_consumer",
    "autoscale",
    "cancel_consumer",
    "disable_events",
    "election",
    "pool_grow",
    "pool_restart",
    "pool_shrink",
    "rate_limit",
    "revoke_by_stamped_headers",
    "shutdown",
    "terminate",
    "time_limit",
)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM, then drain."""
    options = _parse(arguments)
    _set_up_logging()
    # Ctrl-C reaches the whole group; the supervisor decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    settings = Settings.load()
    host = Host(settings, options.spec, options.socket, options.health)
    host.open()
    # What start-up made stays; the collector need not look through it again and again at thousands of jobs a second.
    gc.freeze()
    gc.set_threshold(_GARBAGE_OBJECTS)
    app = worker_app(settings, host)
    worker = app.Worker(
        hostname=f"{options.spec.name.replace('@', '-')}-{host.worker_id.hex[-12:]}@{socket.gethostname()}",
        concurrency=host.slots + SPARE_THREADS,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=False,
    )
    worker.start()
    host.close()
    return int(worker.exitcode or 0)


def _set_up_logging() -> None:
    set_up_logging("consumer")
    signals.setup_logging.connect(lambda **_: None, weak=False)  # whoever listens has done it: Celery leaves it alone
    celery.apps.worker.safe_say = _say  # of a signal, past logging
    # Two lines for each message, at INFO, are what a busy worker would do most.
    for chatty in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _say(message: str, *_: object) -> None:
    """In one system call, for it is said from a signal handler, where logging might wait for itself."""
    record = logging.makeLogRecord({"name": "celery", "levelname": "INFO", "msg": message})
    os.write(sys.stderr.fileno(), f"{JsonLines('consumer').format(record)}\n".encode())


def worker_app(settings: Settings, host: Host) -> Celery:
    """The Celery application whose tasks run on this host."""
    app = celery_app(settings)
    app.conf.broker_transport = "workers.transport:Transport"
    app.amqp.Connection = Connection
    proofs = proof_queue_name(host.spec.name, host.worker_id)
    # Proofs first: no backlog may hold them up.
    names = [proofs, *(queue_name(host.spec.name, lane) for lane in (Lane.INTERACTIVE, Lane.BULK))]
    app.conf.task_queues = [_queue(name) for name in names]
    app.conf.task_default_queue = queue_name(host.spec.name, Lane.INTERACTIVE)

    proof = _prove_consumption(app, host, proofs)
    signer = host.signer

    @app.task(name=RUN_JOB, shared=False, throws=(tasks.JobFailed,))  # type: ignore[untyped-decorator]
    def run_job(job_id: str, signature: object = None, *_: object) -> str:
        with proof.task():
            _refuse_strangers(signer, signature, RUN_JOB, job_id)
            return _or_ignore(lambda: tasks.run_job(host, UUID(job_id)))

    @app.task(name=DRAIN, shared=False)  # type: ignore[untyped-decorator]
    def drain(model: str, signature: object = None, *_: object) -> str:
        with proof.task():
            _refuse_strangers(signer, signature, DRAIN, model)
            return _or_ignore(lambda: f"{tasks.drain(host)} rows")

    @app.task(name=PROVE, shared=False, send_events=False)  # type: ignore[untyped-decorator]
    def prove(*_: object) -> None:
        with proof.task():  # that it came is all; whoever sent it
            pass

    _serve_nothing_else(app)
    host.on_backlog = lambda: _drain_without_message(host)
    _end_our_way(app, host)
    _gather_events(app)
    _cancel_on_revoke(host, signer)
    return app


def _queue(name: str) -> Queue:
    # The nameless exchange delivers by queue name: it needs no binding in Redis, which a flush would lose and a worker
    # that is gone would leave behind.
    # Without acknowledgement: nothing rests on a message that a worker has popped (see `workers.transport`).
    return Queue(name, Exchange(""), routing_key=name, no_ack=True)


def _prove_consumption(app: Celery, host: Host, queue: str) -> ConsumptionProof:
    """Once Celery runs, show at every heartbeat that it consumes, while it can and should."""
    current: list[Transport] = []  # that of the connection which Celery has now

    def send() -> bool | None:
        return host.dispatcher.prove(queue) if host.can_take and not host.draining.is_set() else None

    def hang_up() -> None:
        for transport in current:
            transport.hang_up()

    give_up = partial(_in_background, partial(_end_at_once, host))
    proof = ConsumptionProof(send, hang_up, give_up, host.slots + SPARE_THREADS)
    host.consumes = lambda: proof.consumes
    loop = Loop("proof", host.settings.heartbeat_seconds, proof.run_once)

    class Prove(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, consumer: Any) -> None:
            first = not current
            current[:] = [consumer.connection.transport]
            fetch_while(lambda: host.can_take, consumer.task_consumer.channel.qos)
            if first:
                loop.start()

    app.steps["consumer"].add(Prove)
    return proof


def fetch_while(condition: Callable[[], bool], qos: Any) -> None:
    """Leave messages in the queue for others while this worker can do nothing with them.

    Measured: one that had lost Postgres, with Redis at hand, took half of what was sent again for its own rows.
    """
    has_free_thread = qos.can_consume
    qos.can_consume = lambda: condition() and has_free_thread()


def _refuse_strangers(signer: MessageSigner, signature: object, task: str, subject: object) -> None:
    """First of all: what none of us signed for this task is ignored."""
    if not signer.accepts(signature, task, str(subject)):
        raise Ignore


def _serve_nothing_else(app: Celery) -> None:
    """Celery's own tasks, and commands that would hinder a worker, are there for nobody but strangers on the broker."""
    for name in [name for name in app.tasks if name not in {RUN_JOB, DRAIN, PROVE}]:
        app.tasks.unregister(name)
    for command in _COMMANDS_TAKEN_OUT:
        Panel.data.pop(command, None)


def _or_ignore(work: Any) -> str:
    try:
        return str(work())
    except (tasks.NotOurs, NotFound) as error:
        log.info("%s", error)
        raise Ignore from None


def _drain_without_message(host: Host) -> None:
    """The message is only a hint: rows seen at a heartbeat are drained all the same."""
    if host.drained_by.locked() or host.draining.is_set():
        return

    def drain() -> None:
        try:
            tasks.drain(host)
        except tasks.NotOurs:
            pass
        except Exception:
            log.exception("a drain failed; the next heartbeat starts another")

    _in_background(drain)


def _end_our_way(app: Celery, host: Host) -> None:
    """However Celery ends, it waits for its threads; they end when the host drains."""

    class Drain(bootsteps.StartStopStep):  # type: ignore[misc]
        def start(self, _: Any) -> None:
            # Celery has just installed its own handlers, a second Ctrl-C being one that drops what runs.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        def close(self, _: Any) -> None:
            host.start_draining()

    app.steps["worker"].add(Drain)
    # Celery sends this from its SIGTERM handler, and the database is not for signal handlers.
    signals.worker_shutting_down.connect(lambda **_: _in_background(lambda: _end(host)), weak=False)


def _end(host: Host) -> None:
    """Our own end needs no broker. Celery's waits for one that keeps its connections and answers nothing."""
    _end_in_time(host.settings)
    host.close()
    time.sleep(_CELERY_END_SECONDS)
    log.warning("Celery does not come to its end; this process ends without it")
    os._exit(0)


def _end_at_once(host: Host) -> None:
    """What runs ends or is given back; Celery does not hear, and is not waited for. The supervisor starts another."""
    _end_in_time(host.settings)
    host.close()
    os._exit(1)


def _end_in_time(settings: Settings) -> None:
    """Without Postgres nothing can be ended or given back: after a drain and a lease others have our rows anyway.

    The supervisor waits no longer either, but may be gone.
    """
    timer = threading.Timer(settings.drain_seconds + settings.lease_seconds, _end_now)
    timer.daemon = True
    timer.start()


def _end_now() -> None:
    log.error("the drain does not come to its end; this process ends without it")
    os._exit(1)


def _gather_events(app: Celery) -> None:
    """Task events go out together some times a second.

    Celery sends them as soon as its loop turns, which is just while the job that they tell of begins: it would wait for
    the interpreter.
    """

    class Gather(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.consumer.events:Events",)

        def start(self, consumer: Any) -> None:
            dispatcher = consumer.event_dispatcher
            dispatcher.on_send_buffered = None
            self._timer = consumer.timer.call_repeatedly(_EVENTS_SECONDS, dispatcher.flush)

        def stop(self, _: Any) -> None:
            self._timer.cancel()

    app.steps["consumer"].add(Gather)


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()


def _cancel_on_revoke(host: Host, signer: MessageSigner) -> None:
    """Flower's revoke cancels the job: its task id is the job's id."""
    revoke = Panel.data[REVOKE]

    def revoke_and_cancel(state: Any, task_id: Any, signature: object = None, **options: Any) -> Any:
        if not signer.accepts(signature, REVOKE, revoked_text(task_id)):
            return {"error": "not signed"}
        for one in task_id if isinstance(task_id, list) else [task_id]:
            _cancel(host, str(one))
        # A thread cannot be terminated; the engine stops the job.
        return revoke(state, task_id, **(options | {"terminate": False}))

    Panel.data[REVOKE] = revoke_and_cancel


def _cancel(host: Host, task_id: str) -> None:
    try:
        host.cancel(UUID(task_id))
    except (ValueError, NotFound):
        log.info("revoked task %s is no job", task_id)


def _end_with_parent() -> None:
    """Standard input is the supervisor's pipe: when it closes, the supervisor is gone."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    log.warning("the supervisor is gone")
    os.kill(os.getpid(), signal.SIGTERM)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers.consumer", description="Claim and settle jobs.")
    parser.add_argument("--socket", type=Path, required=True, help="where the engine listens")
    parser.add_argument("--spec", type=ModelSpec.model_validate_json, required=True, help="models.catalog.ModelSpec")
    parser.add_argument("--health", type=_health_folder, help="where it shows that it lives and is ready")
    return parser.parse_args(arguments)


def _health_folder(path: str) -> HealthFolder:
    return HealthFolder(Path(path))


if __name__ == "__main__":
    sys.exit(main())
