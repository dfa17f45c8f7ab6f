"""Fixtures of the fault tests: systems whose deaths are noticed in seconds, and the proof that nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from headrace.servers import Servers
from kit.databases import migrated_template
from kit.homes import temporary_home
from kit.systems import SHORT_LEASES, System, system_on
from kit.waiting import wait_until
from kit.workers import WorkerProcesses

_SLOW = {"engine": "echo", "slots": 4, "seconds_per_token": 0.02, "obeys_faults": True}
MODELS: dict[str, dict[str, Any]] = {
    "slow": _SLOW,
    "other": _SLOW,
    "wide": {"engine": "echo", "slots": 64, "seconds_per_token": 0.02},
}
_GONE_SECONDS = 30.0


@pytest.fixture(scope="session")
def fragile_servers() -> Iterator[Servers]:
    """Servers that the tests here stop, kill and freeze: to set up a pair takes seconds."""
    with temporary_home() as home, Servers(home) as servers:
        yield servers


@pytest.fixture
def own_servers(fragile_servers: Servers) -> Iterator[Servers]:
    """The same, both up before a test and after it."""
    fragile_servers.start()
    yield fragile_servers
    fragile_servers.start()


@pytest.fixture(scope="session")
def fragile_template(fragile_servers: Servers) -> Iterator[str]:
    """A migrated database on them."""
    with migrated_template(fragile_servers.database_url) as name:
        yield name


@pytest.fixture(scope="module")
def new_system(
    servers: Any, database_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], System]]:
    """Makes systems on the session's servers, which live as long as the module."""
    with ExitStack() as systems:

        def make(**changes: Any) -> System:
            folder = tmp_path_factory.mktemp("system")
            settings = SHORT_LEASES | {"models": MODELS} | changes
            return systems.enter_context(system_on(servers, database_template, folder, **settings))

        yield make


@pytest.fixture
def system(new_system: Callable[[], System]) -> Iterator[System]:
    """A system of one test alone; its workers end with the test."""
    system = new_system()
    yield system
    for worker in system.workers:
        worker.close()


@pytest.fixture(scope="module")
def fragile_system(
    fragile_servers: Servers, fragile_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """A system on the servers that fail, which lives as long as the module: it must mend itself between tests."""
    folder = tmp_path_factory.mktemp("system")
    with system_on(fragile_servers, fragile_template, folder, models=MODELS, **SHORT_LEASES) as system:
        yield system


@pytest.fixture(autouse=True, scope="module")
def nothing_survives() -> Iterator[None]:
    """When a module is through, and its systems are closed, no process of theirs is left."""
    before = set(_processes())
    yield
    wait_until(lambda: set(_processes()) <= before, _GONE_SECONDS, f"the end of {_processes()}")


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test no process is left that is neither a fixture's server nor part of a worker still in use."""
    before = set(_processes())
    yield
    wait_until(lambda: set(_processes()) <= before | _of_workers(), _GONE_SECONDS, f"the end of {_processes()}")


def _processes() -> dict[int, str]:
    """Our descendants but for servers, by pid."""
    found = {one.pid: _command(one) for one in psutil.Process().children(recursive=True)}
    return {pid: command for pid, command in found.items() if command and not _is_server(command)}


def _of_workers() -> set[int]:
    return {pid for worker in WorkerProcesses.in_use for pid in worker.processes()}


def _is_server(command: str) -> bool:
    return "postgres" in command or "redis-server" in command


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())  # empty for one that has ended and was not waited for
    except psutil.Error:
        return ""
