"""Which addresses are public, and that a connection goes nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address, ip_network
from typing import Any

import httpcore2
import pytest

from producer.public_network import Address, PublicNetwork, is_public

PUBLIC, PRIVATE = "93.184.216.34", "127.0.0.1"


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:80e::200e"])
def test_public(address: str) -> None:
    """Somebody's on the internet."""
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",  # where clouds keep credentials
        "172.16.0.1",
        "192.0.0.170",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:93.184.216.34",
        "64:ff9b::7f00:1",
        "64:ff9b::5db8:d822",
        "64:ff9b:1::7f00:1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
    ],
)
def test_not_public(address: str) -> None:
    """This machine, its neighbours, everybody at once, or another address in disguise."""
    assert not is_public(ip_address(address))


class _Wire(httpcore2.AsyncNetworkBackend):
    """Remembers where connections went."""

    def __init__(self, *refusing: str) -> None:
        self.asked: list[str] = []
        self._refusing = refusing

    async def connect_tcp(self, host: str, *_: Any, **__: Any) -> httpcore2.AsyncNetworkStream:
        self.asked.append(host)
        if host in self._refusing:
            raise httpcore2.ConnectError("refused")
        return httpcore2.AsyncMockStream([])


def names(*answers: Sequence[str]) -> Callable[[str], Awaitable[list[Address]]]:
    """A resolver that gives these answers, one after the other."""
    left = list(answers)

    async def resolve(_: str) -> list[Address]:
        return [ip_address(address) for address in left.pop(0)]

    return resolve


def network(wire: _Wire, *answers: Sequence[str], allowed: Sequence[str] = ()) -> PublicNetwork:
    made = PublicNetwork([ip_network(name) for name in allowed], names(*answers))
    made._inner = wire
    return made


def connect(through: PublicNetwork, timeout: float | None = 5.0) -> None:
    asyncio.run(through.connect_tcp("hooks.example", 443, timeout))


def test_what_was_checked_is_what_is_connected_to() -> None:
    """The name is asked for once; it could answer with a private address the second time, and nobody asks."""
    wire = _Wire()
    through = network(wire, [PUBLIC], [PRIVATE])
    connect(through)
    assert wire.asked == [PUBLIC]
    with pytest.raises(httpcore2.ConnectError, match=r"127\.0\.0\.1, which is not public"):
        connect(through)
    assert wire.asked == [PUBLIC]


def test_one_bad_address_is_one_too_many() -> None:
    """A name with a public and a private address is not connected to at all."""
    wire = _Wire()
    with pytest.raises(httpcore2.ConnectError, match="not public"):
        connect(network(wire, [PUBLIC, PRIVATE]))
    assert wire.asked == []


def test_the_next_address_is_tried() -> None:
    """As clients do when the first does not answer."""
    wire = _Wire(PUBLIC)
    connect(network(wire, [PUBLIC, "1.1.1.1"]))
    assert wire.asked == [PUBLIC, "1.1.1.1"]


def test_a_network_can_be_allowed() -> None:
    """The operator's own, and no other private one."""
    wire = _Wire()
    through = network(wire, ["10.1.2.3"], ["10.2.0.1"], allowed=["10.1.0.0/16"])
    connect(through)
    with pytest.raises(httpcore2.ConnectError):
        connect(through)
    assert wire.asked == ["10.1.2.3"]


def test_a_name_that_does_not_resolve() -> None:
    """It is a failure to connect; that nothing answers to a number of this form is no way around the check."""
    for host in ("name.invalid", "2130706433", "0x7f.1", "localhost", "127.1"):
        with pytest.raises(httpcore2.ConnectError):
            asyncio.run(PublicNetwork().connect_tcp(host, 80, 30.0))


def test_a_silent_server_of_names_is_waited_for_no_longer_than_said() -> None:
    """Its time is part of the time to connect."""

    async def silent(_: str) -> list[Address]:
        await asyncio.Event().wait()
        return []

    with pytest.raises(httpcore2.ConnectTimeout):
        asyncio.run(PublicNetwork((), silent).connect_tcp("hooks.example", 80, 0.01))
