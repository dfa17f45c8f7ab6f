"""`make soak`: a mix of faults against a loaded system, for SOAK_SECONDS, by a seed that is printed.

    python -m kit.soak [--seconds 600] [--seed N]

The last line is `N jobs, F faults, V violations`; exit status 1 if there was a violation. The same seed gives the same
faults in the same order; when exactly each hits is the machine's.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import redis

from headrace.servers import Servers
from jobs.errors import HeadraceError, StoreUnavailable
from jobs.ids import new_id
from jobs.schema import Job
from jobs.store import Waiting
from kit.databases import migrated_template
from kit.homes import temporary_home
from kit.invariants import Witness
from kit.proxy import Proxy
from kit.systems import System, system_on
from kit.workers import WorkerProcesses

MODELS = {
    "slow": {"engine": "echo", "slots": 8, "seconds_per_token": 0.005},
    "faulty": {"engine": "echo", "slots": 8, "seconds_per_token": 0.005, "obeys_faults": True},
}
WORKERS = ("slow", "slow", "faulty")
_SETTLE_SECONDS = 180.0
_PAUSE_SECONDS = (1.0, 6.0)


@dataclass
class Soak:
    """A system whose workers reach the servers through proxies, and the load on it."""

    system: System
    servers: Servers
    broker: Proxy
    database: Proxy
    chance: random.Random
    workers: dict[int, WorkerProcesses] = field(default_factory=dict)
    accepted: list[Job] = field(default_factory=list)

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

    def heal(self) -> None:
        """Nothing is broken any more."""
        self.servers.start()
        self.broker.heal()
        self.database.heal()


Fault = Callable[[Soak], None]
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    """One of the faults, under its name."""
    FAULTS[function.__name__] = function
    return function


# == faults ======================================================================================================


@fault
def worker_killed(soak: Soak) -> None:
    """All of its processes at once; another takes its place."""
    place, worker = soak.some_worker()
    worker.kill()
    soak.hire(place)


@fault
def worker_stopped(soak: Soak) -> None:
    """SIGTERM, and another."""
    place, worker = soak.some_worker()
    worker.begin_stop()
    soak.hire(place)


@fault
def engine_killed(soak: Soak) -> None:
    """Only the engine."""
    soak.some_worker()[1].engine.kill()


@fault
def consumer_killed(soak: Soak) -> None:
    """Only the consumer."""
    soak.some_worker()[1].consumer.kill()


@fault
def consumer_frozen(soak: Soak) -> None:
    """For longer than a lease: it wakes up as a zombie."""
    consumer = soak.some_worker()[1].consumer
    consumer.suspend()
    _sleep(12.0)
    consumer.resume()


@fault
def redis_flushed(soak: Soak) -> None:
    """Every message is gone."""
    with redis.Redis.from_url(soak.servers.broker_url) as client:
        client.flushall()


@fault
def redis_killed(soak: Soak) -> None:
    """It comes back some seconds later."""
    soak.servers.redis.kill()
    _sleep(soak.chance.uniform(0, 10))
    soak.servers.redis.start()


@fault
def redis_silent(soak: Soak) -> None:
    """Connections stand, nobody answers, new ones neither."""
    soak.broker.silence()
    _sleep(soak.chance.uniform(1, 10))
    soak.broker.heal()


@fault
def redis_connections_silent(soak: Soak) -> None:
    """Only those that stood."""
    soak.broker.silence(new_too=False)


@fault
def redis_replies_lost(soak: Soak) -> None:
    """What was popped is gone."""
    soak.broker.lose(0.2, "down")
    _sleep(5.0)
    soak.broker.heal()


@fault
def postgres_stopped(soak: Soak) -> None:
    """At once, and started."""
    soak.servers.postgres.stop(immediate=True)
    _sleep(soak.chance.uniform(0, 5))
    soak.servers.postgres.start()


@fault
def postgres_sessions_ended(soak: Soak) -> None:
    """All of this system's."""
    with suppress(psycopg.Error):
        soak.system.tables.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )


@fault
def postgres_silent(soak: Soak) -> None:
    """For about a lease."""
    soak.database.silence()
    _sleep(soak.chance.uniform(1, 12))
    soak.database.heal()


@fault
def postgres_connections_silent(soak: Soak) -> None:
    """Only those that stood."""
    soak.database.silence(new_too=False)


@fault
def postgres_replies_lost(soak: Soak) -> None:
    """Commits whose success nobody hears of."""
    soak.database.lose(0.05, "down")
    _sleep(5.0)
    soak.database.heal()


@fault
def connections_cut(soak: Soak) -> None:
    """Both servers', by a reset."""
    soak.broker.cut()
    soak.database.cut()


@fault
def line_slow(soak: Soak) -> None:
    """Every byte is late."""
    soak.database.delay(0.02)
    soak.broker.delay(0.05)
    _sleep(5.0)
    soak.heal()


@fault
def garbage(soak: Soak) -> None:
    """Into the queue of interactive jobs."""
    with suppress(redis.RedisError), redis.Redis.from_url(soak.servers.broker_url) as client:
        for item in (b"{", b"[]", b"\xff", b'{"body": "x", "properties": {}}'):
            client.lpush(f"{soak.system.settings.key_prefix}:slow.interactive", item)


@fault
def duplicates(soak: Soak) -> None:
    """Messages of jobs that wait, run or have ended, many times."""
    jobs = [soak.chance.choice(soak.accepted) for _ in range(10)] if soak.accepted else []
    soak.system.producer.dispatcher.publish([Waiting(job.id, job.model, job.priority) for job in jobs] * 10)


@fault
def poison(soak: Soak) -> None:
    """A job that ends its engine each time. Suspects run one by one after that, so there are few others."""
    _submit(soak, {"model": "faulty", "prompt": "!exit"})


@fault
def hang(soak: Soak) -> None:
    """A job that stops its engine in a step, beside others and then alone."""
    _submit(soak, {"model": "faulty", "prompt": "!hang", "max_attempts": 1})


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


def _submit(soak: Soak, request: dict[str, Any]) -> None:
    """Until it is known to be accepted: repeated under the same id."""
    job_id: UUID = new_id()
    for _ in range(10):
        with suppress(StoreUnavailable):
            soak.accepted.append(soak.system.producer.submit(job_id=job_id, **request))
            return


# == the run =====================================================================================================


def run(seconds: float, seed: int) -> int:
    """Returns the number of violations."""
    chance = random.Random(seed)
    happened: Counter[str] = Counter()
    with _soak(chance) as soak, Witness(soak.system, claims_forgotten=True) as witness:
        stop = threading.Event()
        load = threading.Thread(target=_load, args=(soak, random.Random(seed + 1), stop))
        load.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            name = chance.choice(list(FAULTS))
            _say(f"{seconds - (until - time.monotonic()):6.1f} s  {name}, {len(soak.accepted)} jobs so far")
            with suppress(psycopg.Error, redis.RedisError, HeadraceError):
                FAULTS[name](soak)
            happened[name] += 1
            _sleep(chance.uniform(*_PAUSE_SECONDS))
        stop.set()
        load.join()
        soak.heal()
        violations = _violations(soak, witness)
    for line in violations:
        _say(line)
    _say(f"{len(soak.accepted)} jobs, {happened.total()} faults, {len(violations)} violations")
    return len(violations)


def _violations(soak: Soak, witness: Witness) -> list[str]:
    witness.saw(*soak.accepted)
    with suppress(AssertionError):
        witness.check(_SETTLE_SECONDS)
    return witness.violations()


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
