"""`headrace doctor`: is everything as it should be, and if not, what to do about it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import redis

from headrace import migrations
from jobs.database import Database
from jobs.dispatch import Dispatcher
from jobs.errors import StoreUnavailable
from jobs.leases import Leases, Worker
from jobs.overview import Overview, Route, Server, look, reach
from jobs.settings import Settings
from jobs.states import Lane, WorkerState

_CLOCK_SECONDS = 5.0
_WAIT_SECONDS = 3.0
_LONG_SECONDS = 60.0
_UNREACHABLE = "is it up? `headrace up --detach` starts one; else see HEADRACE_DATABASE_URL and HEADRACE_BROKER_URL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    about: str
    well: bool
    says: str
    advice: str = ""  # what to do; empty if it is well


def examine(settings: Settings) -> list[Finding]:
    """Look at everything that can be looked at. What cannot be reached is a finding, not an error."""
    findings = list(_broker(settings))
    try:
        with closing(Database(str(settings.database_url), _WAIT_SECONDS, pool_size=1)) as database:
            return [*_store(settings, database), *findings]
    except StoreUnavailable as error:
        return [Finding("Postgres", well=False, says=str(error), advice=_UNREACHABLE), *findings]


def _store(settings: Settings, database: Database) -> Iterator[Finding]:
    server = reach(database)
    yield Finding("Postgres", well=True, says=f"{server.version}, answers in {1000 * server.answer_seconds:.0f} ms")
    yield _clocks(server)
    current, newest = migrations.versions(str(settings.database_url))
    if current != newest:
        advice = (
            "`headrace migrate`" if current is None or current < newest else "this Headrace is older than the tables"
        )
        yield Finding("migrations", well=False, says=f"at {current or 'none'}, newest is {newest}", advice=advice)
        return
    seen = look(database)
    workers = Leases(database, settings.lease_seconds).list()
    yield Finding("migrations", well=True, says=newest)
    yield from _workers(seen, workers)
    yield from (_route(settings, route, workers) for route in seen.routes)
    yield _leases(seen)
    yield _failures(seen)


def _clocks(server: Server) -> Finding:
    off = abs(server.clock_seconds) > _CLOCK_SECONDS
    advice = "set one of the clocks; jobs go by the database's, logs by this machine's" if off else ""
    return Finding("clocks", not off, f"this machine is {server.clock_seconds:+.1f} s from Postgres", advice)


def _workers(seen: Overview, workers: Sequence[Worker]) -> Iterator[Finding]:
    if not workers:
        yield Finding(
            "workers", well=False, says="none is live", advice="`headrace worker --model M`, or `headrace up`"
        )
    for one in workers:
        says = (
            f"{one.host}, pid {one.pid}: {one.running} running of {one.slots}, lease ends in {one.seconds_left:.0f} s"
        )
        advice = "" if one.ready else "its engine does not answer, or no message arrives: see its log"
        yield Finding(f"worker of {one.model}", one.ready, f"{says}{'' if one.ready else ', not ready'}", advice)
    if seen.died:
        says = f"{seen.died} died within an hour"
        yield Finding("workers", well=False, says=says, advice="see their logs; their jobs were given to others")


def _route(settings: Settings, route: Route, workers: Sequence[Worker]) -> Finding:
    says = f"{route.interactive} interactive and {route.bulk} in bulk wait, {route.running} run; "
    says += f"{_depth(settings, route.model)} messages in Redis"
    served = any(one.model == route.model and one.state is WorkerState.LIVE for one in workers)
    advice = ""
    if not served and route.interactive + route.bulk:
        advice = f"nobody serves it: `headrace worker --model {route.model}`"
    elif route.oldest_seconds > _LONG_SECONDS:
        advice = f"the oldest has waited for {route.oldest_seconds:.0f} s: more workers, or fewer jobs"
    return Finding(f"queue of {route.model}", not advice, says, advice)


def _depth(settings: Settings, model: str) -> str:
    with closing(Dispatcher(settings, lambda _: None)) as dispatcher:
        depth = dispatcher.depth(model, Lane.INTERACTIVE, _WAIT_SECONDS)
    return "unknown" if depth is None else str(depth)


def _leases(seen: Overview) -> Finding:
    if not seen.orphans and not seen.unpublished:
        return Finding("leases", well=True, says="every row that runs is held by a live worker")
    says = f"{seen.orphans} rows run under nobody, {seen.unpublished} were never sent"
    return Finding(
        "leases", well=False, says=says, advice="nobody sweeps: start a worker, of any model, or see its log"
    )


def _failures(seen: Overview) -> Finding:
    advice = "`headrace failed list` says why" if seen.failed else ""
    return Finding("failed jobs", not seen.failed, f"{seen.failed} within a day", advice)


def _broker(settings: Settings) -> Iterator[Finding]:
    try:
        with redis.Redis.from_url(str(settings.broker_url), socket_timeout=_WAIT_SECONDS, retry=None) as client:
            began = time.monotonic()
            info = client.info()
            seconds = time.monotonic() - began
    except (redis.RedisError, OSError) as error:
        yield Finding("Redis", well=False, says=str(error), advice=f"{_UNREACHABLE}. Jobs wait, none is lost")
        return
    yield Finding("Redis", well=True, says=f"{info['redis_version']}, answers in {1000 * seconds:.0f} ms")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        advice = "set maxmemory-policy noeviction: an evicted queue costs seconds each time"
        yield Finding("Redis", well=False, says=f"evicts by {policy} when it is full", advice=advice)
