"""Fixtures of every test: one Postgres and one Redis for the session, and what each test has of them for itself."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import redis
from xdist.scheduler import LoadFileScheduling

from headrace.servers import Servers
from kit.canaries import has_leaked, watch
from kit.databases import SECRET, migrated_template, temporary_database
from kit.homes import temporary_home

if TYPE_CHECKING:
    from jobs.settings import Settings

watch(SECRET)


@dataclass(frozen=True)
class SharedServers:
    """Where the session's servers are. No test stops or flushes them."""

    database_url: str
    broker_url: str


@pytest.fixture(scope="session")
def servers() -> Iterator[SharedServers]:
    """The servers that HEADRACE_DATABASE_URL and HEADRACE_BROKER_URL name, else embedded ones."""
    given = [os.environ.get("HEADRACE_DATABASE_URL"), os.environ.get("HEADRACE_BROKER_URL")]
    if all(given):
        _watch_passwords(*given)
        yield SharedServers(*filter(None, given))
    elif any(given):
        raise pytest.UsageError("set both HEADRACE_DATABASE_URL and HEADRACE_BROKER_URL, or none of them")
    else:
        with temporary_home() as home, Servers(home) as embedded:
            _watch_passwords(embedded.database_url, embedded.broker_url)
            watch(embedded.secret)
            yield SharedServers(embedded.database_url, embedded.broker_url)


def _watch_passwords(*urls: str | None) -> None:
    watch(*(urlsplit(url).password for url in urls if url))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """How tests are spread over processes (`-n 2`), each of which has servers of its own: file by file."""
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side the fault tests come first: they take longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith("tests/faults/"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: object) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that prints or logs a secret of the suite has failed, whatever else it found."""
    report = yield
    if has_leaked("".join(said for _, said in report.sections)):
        report.outcome, report.longrepr = "failed", f"{item.nodeid}: its output holds a secret"
    return report


@pytest.fixture
def own_servers() -> Iterator[Servers]:
    """Embedded servers for one test alone, started, which it may stop, kill and freeze."""
    with temporary_home() as home, Servers(home) as embedded:
        _watch_passwords(embedded.database_url, embedded.broker_url)
        watch(embedded.secret)
        yield embedded


@pytest.fixture(scope="session")
def database_template(servers: SharedServers) -> Iterator[str]:
    """Name of a migrated database to make others from."""
    with migrated_template(servers.database_url) as name:
        yield name


@pytest.fixture
def database_url(servers: SharedServers, database_template: str) -> Iterator[str]:
    """A migrated and empty database for one test."""
    with temporary_database(servers.database_url, database_template) as url:
        yield url


@pytest.fixture
def key_prefix(servers: SharedServers) -> Iterator[str]:
    """What one test puts before its Redis keys; they are deleted at the end."""
    prefix = f"test-{secrets.token_hex(6)}"
    yield prefix
    with redis.Redis.from_url(servers.broker_url) as client:
        keys = list(client.scan_iter(f"{prefix}*", count=1000))
        if keys:
            client.unlink(*keys)


@pytest.fixture
def settings(tmp_path: Path, database_url: str, servers: SharedServers, key_prefix: str) -> Settings:
    """Settings of a system that shares nothing with other tests but the servers."""
    from jobs.settings import Settings

    return Settings.load(
        home=tmp_path / "home",
        database_url=database_url,
        broker_url=servers.broker_url,
        secret=SECRET,
        key_prefix=key_prefix,
    )
