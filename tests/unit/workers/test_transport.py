"""How a worker dials a broker that is away."""

from __future__ import annotations

import socket

import pytest
from kombu.exceptions import OperationalError
from kombu.utils import functional

from workers.transport import Connection


def test_waits_between_two_tries_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the broker has been away; and no two workers wait alike."""
    monkeypatch.setattr(functional, "sleep", lambda _: None)
    first, second = _waits(20), _waits(20)
    assert 0 < first[0] < first[-1] == max(first) <= 2.0
    assert first != second


def _waits(tries: int) -> list[float]:
    """Between so many tries to reach a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found: list[float] = []
    with Connection(f"redis://127.0.0.1:{port}") as connection, pytest.raises(OperationalError):
        connection.ensure_connection(lambda _, wait: found.append(wait), tries)
    return found
