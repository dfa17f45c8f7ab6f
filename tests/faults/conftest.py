"""Fixtures of the fault tests: systems whose deaths are noticed in seconds, and the proof that nothing stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.servers import Servers
from kit.databases import migrated_template
from kit.homes import temporary_home
from kit.systems import SHORT_LEASES, System, system_on
from kit.waiting import wait_until

MODELS: dict[str, dict[str, Any]] = {
    "slow": {"engine": "echo", "slots": 4, "seconds_per_token": 0.02},
    "wide": {"engine": "echo", "slots": 64, "seconds_per_token": 0.02},
}
_GONE_SECONDS = 30.0


@pytest.fixture(scope="session")
def module_servers() -> Iterator[Servers]:
    """Servers that the tests here stop, kill and freeze: to set them up takes seconds."""
    with temporary_home() as home, Servers(home) as servers:
        yield servers


@pytest.fixture
def own_servers(module_servers: Servers) -> Servers:
    """The same, both up."""
    module_servers.start()
    return module_servers


@pytest.fixture(scope="session")
def own_template(module_servers: Servers) -> Iterator[str]:
    """A migrated database on them."""
    with migrated_template(module_servers.database_url) as name:
        yield name
        module_servers.start()


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """After each test no process is left that was not there before it; the fixtures' servers are their own affair."""
    before = _processes().keys()
    yield
    wait_until(lambda: _processes().keys() <= before, _GONE_SECONDS, f"gone: {_processes()}")


@pytest.fixture
def system(servers: Any, database_template: str, tmp_path: Path) -> Iterator[System]:
    """A system on the session's servers."""
    with system_on(servers, database_template, tmp_path, models=MODELS, **SHORT_LEASES) as system:
        yield system


@pytest.fixture
def own_system(own_servers: Servers, own_template: str, tmp_path: Path) -> Iterator[System]:
    """A system on servers that the test may stop."""
    with system_on(own_servers, own_template, tmp_path, models=MODELS, **SHORT_LEASES) as system:
        try:
            yield system
        finally:
            own_servers.start()  # what follows wants to drop a database


def _processes() -> dict[int, str]:
    """Our descendants, by pid."""
    found = {one.pid: _command(one) for one in psutil.Process().children(recursive=True)}
    return {pid: command for pid, command in found.items() if command and not _is_server(command)}


def _is_server(command: str) -> bool:
    return "postgres" in command or "redis-server" in command


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())  # empty for one that has ended and was not waited for
    except psutil.Error:
        return ""
