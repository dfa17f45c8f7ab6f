"""`make soak`: a mix of faults against a loaded system, for SOAK_SECONDS, by a seed that is printed.

    python -m kit.soak [--seconds 600] [--seed N]

The last line is `N jobs, F faults, V violations` of I1 to I9; exit status 1 if there was one. The same seed gives the
same faults in the same order; when exactly each hits is the machine's.

While faults come, keys are used again (I6), a bulk run's client is killed (I4), recovery is timed (I7) and readiness is
held against the servers (I8). Once all is well, the tables and the engines' log are looked at (I1, I2, I3, I5), and the
memory of the processes (I9).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import psycopg
import redis

from headrace.servers import Servers
from jobs.errors import HeadraceError, IdempotencyConflict, StoreUnavailable
from jobs.ids import new_id
from jobs.schema import Job
from jobs.store import Waiting
from kit.bulk import BulkClient
from kit.databases import migrated_template
from kit.homes import temporary_home
from kit.invariants import BrokenPromise, Witness, check_memory
from kit.proxy import Proxy
from kit.systems import System, system_on
from kit.waiting import wait_until
from kit.workers import WorkerProcesses

MODELS = {
    "slow": {"engine": "echo", "slots": 8, "seconds_per_token": 0.005},
    "faulty": {"engine": "echo", "slots": 8, "seconds_per_token": 0.005, "obeys_faults": True},
}
WORKERS = ("slow", "slow", "faulty")
BULK_LINES = 200
SOON_SECONDS = 30.0
TURN_SECONDS = 10.0  # of readiness
_SETTLE_SECONDS = 180.0
_PAUSE_SECONDS = (1.0, 6.0)
_LULLS = 0.3  # after so many of the faults
_HOLDERS = """
    SELECT DISTINCT w.pid, w.lease_until < now() AS lease_is_over
    FROM jobs j JOIN workers w ON w.id = j.worker_id WHERE j.state = 'running'
"""


@dataclass
class Soak:
    """A system whose workers reach the servers through proxies, the load on it, and what is found broken meanwhile."""

    system: System
    servers: Servers
    broker: Proxy
    database: Proxy
    chance: random.Random
    bulk: BulkClient = field(init=False)
    workers: dict[int, WorkerProcesses] = field(default_factory=dict)
    accepted: list[Job] = field(default_factory=list)
    keyed: list[tuple[dict[str, Any], UUID]] = field(default_factory=list)  # requests with a key, and what each became
    suffered: list[Fault] = field(default_factory=list)
    unrecovered: list[Fault] = field(default_factory=list)  # since the last lull
    violations: list[str] = field(default_factory=list)

    def hire(self, place: int) -> None:
        """A new worker in that place."""
        urls = {
            "broker_url": self.broker.url(self.servers.broker_url),
            "database_url": self.database.url(str(self.system.settings.database_url)),
        }
        self.workers[place] = self.system.launch(WORKERS[place], **urls)

    def some_worker(self) -> tuple[int, WorkerProcesses]:
        """Any of them."""
        return self.chance.choice(list(self.workers.items()))

    def suffer(self, fault: Fault) -> None:
        """Inject it."""
        with suppress(psycopg.Error, redis.RedisError, HeadraceError):
            fault.inject(self)
        self.suffered.append(fault)
        self.unrecovered.append(fault)

    def heal(self) -> None:
        """Nothing is broken any more."""
        self.servers.start()
        self.broker.heal()
        self.database.heal()

    def recover(self) -> None:
        """I7, in a lull: a new job runs, and none is held by the dead, within the longest bound of the last faults."""
        self.heal()
        job = _submit(self, {"model": "slow", "prompt": "x", "priority": 0})
        within_seconds = max((fault.within_seconds for fault in self.unrecovered), default=SOON_SECONDS)
        names = ", ".join(fault.name for fault in self.unrecovered)
        began = time.monotonic()
        self.expect(f"I7 recovers from {names}", lambda: _has_recovered(self.system, job), within_seconds)
        _say(f"          recovered in {time.monotonic() - began:.1f} s of {within_seconds:g} s")
        self.unrecovered.clear()

    def expect(self, promise: str, holds: Callable[[], bool], within_seconds: float) -> None:
        """That it holds soon; else it is a violation."""
        try:
            wait_until(holds, within_seconds, promise)
        except TimeoutError:
            self.violations.append(f"{promise}: not within {within_seconds:g} s")

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A promise that is found broken in this block is a violation among others."""
        try:
            yield
        except BrokenPromise as broken:
            self.violations.append(str(broken))


@dataclass(frozen=True)
class Fault:
    """Something that happens, and how long the recovery from it may take."""

    name: str
    inject: Callable[[Soak], None]
    within_seconds: float


FAULTS: list[Fault] = []


def fault(within_seconds: float) -> Callable[[Callable[[Soak], None]], Callable[[Soak], None]]:
    """One of the faults, with its bound of docs/guarantees.md."""

    def add(inject: Callable[[Soak], None]) -> Callable[[Soak], None]:
        FAULTS.append(Fault(inject.__name__, inject, within_seconds))
        return inject

    return add


# == faults ======================================================================================================


@fault(within_seconds=15)
def worker_killed(soak: Soak) -> None:
    """All of its processes at once; another takes its place."""
    place, worker = soak.some_worker()
    worker.kill()
    soak.hire(place)


@fault(within_seconds=15)
def worker_stopped(soak: Soak) -> None:
    """SIGTERM, and another."""
    place, worker = soak.some_worker()
    worker.begin_stop()
    soak.hire(place)


@fault(within_seconds=15)
def engine_killed(soak: Soak) -> None:
    """Only the engine."""
    soak.some_worker()[1].engine.kill()


@fault(within_seconds=15)
def consumer_killed(soak: Soak) -> None:
    """Only the consumer."""
    soak.some_worker()[1].consumer.kill()


@fault(within_seconds=15)
def consumer_frozen(soak: Soak) -> None:
    """For longer than a lease: it wakes up as a zombie."""
    consumer = soak.some_worker()[1].consumer
    consumer.suspend()
    _sleep(12.0)
    consumer.resume()


@fault(within_seconds=30)
def redis_flushed(soak: Soak) -> None:
    """Every message is gone."""
    with redis.Redis.from_url(soak.servers.broker_url) as client:
        client.flushall()


@fault(within_seconds=30)
def redis_killed(soak: Soak) -> None:
    """It comes back some seconds later."""
    soak.servers.redis.kill()
    _sleep(soak.chance.uniform(0, 10))
    soak.servers.redis.start()


@fault(within_seconds=20)
def redis_silent(soak: Soak) -> None:
    """Connections stand, nobody answers, new ones neither."""
    soak.broker.silence()
    _sleep(soak.chance.uniform(1, 10))
    soak.broker.heal()


@fault(within_seconds=20)
def redis_connections_silent(soak: Soak) -> None:
    """Only those that stood."""
    soak.broker.silence(new_too=False)


@fault(within_seconds=30)
def redis_replies_lost(soak: Soak) -> None:
    """What was popped is gone."""
    soak.broker.lose(0.2, "down")
    _sleep(5.0)
    soak.broker.heal()


@fault(within_seconds=60)
def postgres_stopped(soak: Soak) -> None:
    """At once, and started."""
    soak.servers.postgres.stop(immediate=True)
    _sleep(soak.chance.uniform(0, 5))
    soak.servers.postgres.start()


@fault(within_seconds=60)
def postgres_sessions_ended(soak: Soak) -> None:
    """All of this system's."""
    with suppress(psycopg.Error):
        soak.system.tables.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )


@fault(within_seconds=20)
def postgres_silent(soak: Soak) -> None:
    """For about a lease."""
    soak.database.silence()
    _sleep(soak.chance.uniform(1, 12))
    soak.database.heal()


@fault(within_seconds=20)
def postgres_connections_silent(soak: Soak) -> None:
    """Only those that stood."""
    soak.database.silence(new_too=False)


@fault(within_seconds=20)
def postgres_replies_lost(soak: Soak) -> None:
    """Commits whose success nobody hears of."""
    soak.database.lose(0.05, "down")
    _sleep(5.0)
    soak.database.heal()


@fault(within_seconds=20)
def connections_cut(soak: Soak) -> None:
    """Both servers', by a reset."""
    soak.broker.cut()
    soak.database.cut()


@fault(within_seconds=20)
def line_slow(soak: Soak) -> None:
    """Every byte is late."""
    soak.database.delay(0.02)
    soak.broker.delay(0.05)
    _sleep(5.0)
    soak.heal()


@fault(within_seconds=30)
def garbage(soak: Soak) -> None:
    """Into the queue of interactive jobs."""
    with suppress(redis.RedisError), redis.Redis.from_url(soak.servers.broker_url) as client:
        for item in (b"{", b"[]", b"\xff", b'{"body": "x", "properties": {}}'):
            client.lpush(f"{soak.system.settings.key_prefix}:slow.interactive", item)


@fault(within_seconds=30)
def duplicates(soak: Soak) -> None:
    """Messages of jobs that wait, run or have ended, many times."""
    jobs = [soak.chance.choice(soak.accepted) for _ in range(10)] if soak.accepted else []
    soak.system.producer.dispatcher.publish([Waiting(job.id, job.model, job.priority) for job in jobs] * 10)


@fault(within_seconds=30)
def poison(soak: Soak) -> None:
    """A job that ends its engine each time. Suspects run one by one after that, so there are few others."""
    _submit(soak, {"model": "faulty", "prompt": "!exit"})


@fault(within_seconds=30)
def hang(soak: Soak) -> None:
    """A job that stops its engine in a step, beside others and then alone."""
    _submit(soak, {"model": "faulty", "prompt": "!hang", "max_attempts": 1})


@fault(within_seconds=30)
def bulk_client_killed(soak: Soak) -> None:
    """The same command goes on."""
    with soak.noting():
        soak.bulk.kill()


@fault(within_seconds=30)
def redis_away(soak: Soak) -> None:
    """Until workers say so."""
    _away(soak, "Redis", soak.broker)


@fault(within_seconds=60)
def postgres_away(soak: Soak) -> None:
    """Until workers say so."""
    _away(soak, "Postgres", soak.database)


def _away(soak: Soak, server: str, proxy: Proxy) -> None:
    """I8: workers that are ready follow the server within ten seconds each way. One with a bad engine has a reason."""
    soak.recover()
    ready = [worker for place, worker in soak.workers.items() if WORKERS[place] == "slow" and worker.shows_ready]
    proxy.refuse()
    proxy.cut()
    soak.expect(f"I8 unready without {server}", lambda: not any(one.shows_ready for one in ready), TURN_SECONDS)
    proxy.accept()
    soak.expect(f"I8 ready with {server}", lambda: all(one.shows_ready for one in ready), TURN_SECONDS)


# == load ========================================================================================================


def _load(soak: Soak, chance: random.Random, stop: threading.Event) -> None:
    """Jobs of every kind, some cancelled, as fast as two cores bear beside everything else."""
    while not stop.wait(0.2):
        with suppress(HeadraceError):
            for _ in range(chance.randint(1, 3)):
                _submit(soak, _request(chance))
            if chance.random() < 0.2:
                soak.accepted += soak.system.producer.submit_many(_plain(chance) for _ in range(20))
            if chance.random() < 0.2 and soak.accepted:
                soak.system.producer.cancel(chance.choice(soak.accepted[-50:]).id)
            if chance.random() < 0.2:
                _submit_keyed(soak, _plain(chance))
            if chance.random() < 0.2 and soak.keyed:
                _submit_again(soak, *chance.choice(soak.keyed))


def _plain(chance: random.Random) -> dict[str, Any]:
    return {"model": "slow" if chance.random() < 0.8 else "faulty", "prompt": "x" * chance.randint(1, 200)}


def _request(chance: random.Random) -> dict[str, Any]:
    request = _plain(chance) | {"priority": chance.randint(0, 9)}
    if chance.random() < 0.1:
        request["deadline_seconds"] = chance.uniform(0.5, 10)
    if chance.random() < 0.2:
        request["messages"] = [{"role": "user", "content": request.pop("prompt")}]
        request["conversation"] = f"talk-{chance.randint(0, 20)}"
    return request


def _submit(soak: Soak, request: dict[str, Any]) -> UUID:
    """Until it is known to be accepted: repeated under the same id. The id; perhaps of no job."""
    job_id = new_id()
    for _ in range(10):
        with suppress(StoreUnavailable):
            soak.accepted.append(soak.system.producer.submit(job_id=job_id, **request))
            break
    return job_id


def _submit_keyed(soak: Soak, request: dict[str, Any]) -> None:
    keyed = request | {"idempotency_key": str(new_id())}
    job = soak.system.producer.submit(**keyed)
    soak.accepted.append(job)
    soak.keyed.append((keyed, job.id))


def _submit_again(soak: Soak, request: dict[str, Any], job_id: UUID) -> None:
    """I6: the same key is the same job, and with another request it is refused."""
    again = soak.system.producer.submit(**request).id
    if again != job_id:
        soak.violations.append(f"I6 same key, same job: {job_id} was accepted again as {again}")
    with suppress(IdempotencyConflict):
        other = soak.system.producer.submit(**request | {"prompt": request["prompt"] + "y"}).id
        soak.violations.append(f"I6 same key, same job: another request under the key of {job_id} became {other}")


# == what is so in the end =======================================================================================


def _has_recovered(system: System, job_id: UUID) -> bool:
    """Whether this job has ended, and no job is held by a process or a lease that has."""
    with suppress(HeadraceError, psycopg.Error):
        return system.producer.get(job_id).state.final and not any(map(_is_dead, system.tables.rows(_HOLDERS)))
    return False


def _is_dead(holder: dict[str, Any]) -> bool:
    return holder["lease_is_over"] or not psutil.pid_exists(holder["pid"])


def _settle(soak: Soak, witness: Witness) -> None:
    """Now that nothing is broken any more."""
    soak.heal()
    with soak.noting():
        soak.bulk.finish(_SETTLE_SECONDS)
    for keyed in soak.keyed:
        _submit_again(soak, *keyed)
    witness.saw(*soak.accepted)
    with suppress(BrokenPromise):
        witness.check(_SETTLE_SECONDS)
    soak.violations += witness.violations()
    with soak.noting():
        check_memory(lambda: _processes(soak), lambda: _work(soak.system))


def _processes(soak: Soak) -> list[psutil.Process]:
    for worker in soak.workers.values():
        worker.await_ready()
    return [process for worker in soak.workers.values() for process in worker.members()]


def _work(system: System) -> None:
    """The same each time."""
    system.producer.submit_many({"model": model, "prompt": "x" * 50} for model in MODELS for _ in range(200))
    system.await_all_ended()


# == the run =====================================================================================================


def run(seconds: float, seed: int) -> int:
    """Returns the number of violations."""
    chance = random.Random(seed)
    with _soak(chance) as soak, Witness(soak.system, claims_forgotten=True) as witness:
        stop = threading.Event()
        load = threading.Thread(target=_load, args=(soak, random.Random(seed + 1), stop))
        load.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            chosen = chance.choice(FAULTS)
            _say(f"{seconds - (until - time.monotonic()):6.1f} s  {chosen.name}, {len(soak.accepted)} jobs so far")
            soak.suffer(chosen)
            _sleep(chance.uniform(*_PAUSE_SECONDS))
            if chance.random() < _LULLS:
                soak.recover()
            with soak.noting():
                soak.bulk.go_on()
        stop.set()
        load.join()
        _settle(soak, witness)
    for line in soak.violations:
        _say(line)
    _say(f"{soak.bulk.files} files of a bulk run, {len(soak.keyed)} keys used again")
    _say(f"{len(soak.accepted)} jobs, {len(soak.suffered)} faults, {len(soak.violations)} violations")
    return len(soak.violations)


@contextmanager
def _soak(chance: random.Random) -> Iterator[Soak]:
    with (
        temporary_home() as home,
        Servers(home) as servers,
        migrated_template(servers.database_url) as template,
        tempfile.TemporaryDirectory() as folder,
        Proxy.before(servers.broker_url) as broker,
        Proxy.before(servers.database_url) as database,
        system_on(servers, template, Path(folder), models=MODELS) as system,
    ):
        soak = Soak(system, servers, broker, database, chance)
        for place in range(len(WORKERS)):
            soak.hire(place)
        for worker in soak.workers.values():
            worker.await_ready()
        with BulkClient.on(system, Path(folder), "slow", BULK_LINES) as soak.bulk:
            yield soak


def _sleep(seconds: float) -> None:
    threading.Event().wait(seconds)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m kit.soak", description="Break things, and see what holds.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    _say(f"seed {options.seed}")
    return 1 if run(options.seconds, options.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
