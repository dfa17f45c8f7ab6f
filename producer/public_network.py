"""Connections to public addresses alone, for URLs that strangers name.

A name is resolved once, every address it has is checked, and one of those is connected to: a name that answers with
another address the next time changes nothing. The URL's host stays what TLS and the `Host` header are about.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeAlias

import httpcore2
from anyio import CapacityLimiter, fail_after
from anyio.to_thread import run_sync

from jobs.settings import Network

Address: TypeAlias = IPv4Address | IPv6Address
Resolve: TypeAlias = Callable[[str], Awaitable[Sequence[Address]]]

# The only part of IPv6 that is handed out to anybody (RFC 4291); and what in it stands for an address of IPv4, which a
# relay or this machine may translate to a private one: Teredo and 6to4. NAT64 (64:ff9b::/96), mapped and compatible
# addresses lie outside.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_TRANSLATED = (IPv6Network("2001::/32"), IPv6Network("2002::/16"))
_RELAYS = ip_network("192.88.99.0/24")
# A server of names that is silent holds a thread.
_LOOKUPS = 64


def is_public(address: Address) -> bool:
    """Whether it can belong to anybody on the internet, and not to this machine or its neighbours."""
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, IPv6Address):
        return address in _GLOBAL_UNICAST and not any(address in network for network in _TRANSLATED)
    return address not in _RELAYS


class PublicNetwork(httpcore2.AsyncNetworkBackend):
    """What a connection pool connects by. `allowed` networks may be reached, too."""

    def __init__(self, allowed: Sequence[Network] = (), resolve: Resolve | None = None) -> None:
        self._allowed = allowed
        self._resolve = resolve or _Resolver()
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's own signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to an address of the host. Raises ConnectError if any of them is not public."""
        try:
            with fail_after(timeout):
                addresses = await self._resolve(host)
                for address in addresses:
                    self._check(host, address)
                return await self._first(addresses, port, local_address, socket_options)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(f"{host} cannot be reached within {timeout:g} s") from error

    def _check(self, host: str, address: Address) -> None:
        if not is_public(address) and not any(address in network for network in self._allowed):
            raise httpcore2.ConnectError(f"{host} has the address {address}, which is not public")

    async def _first(self, addresses: Sequence[Address], port: int, *options: Any) -> httpcore2.AsyncNetworkStream:
        """The first that takes the connection."""
        failure = httpcore2.ConnectError("the host has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(str(address), port, None, *options)
            except httpcore2.ConnectError as error:
                failure = error
        raise failure


class _Resolver:
    """The system's."""

    def __init__(self) -> None:
        self._limiter = CapacityLimiter(_LOOKUPS)

    async def __call__(self, host: str) -> list[Address]:
        try:
            # On our own threads: the loop's are few, and others wait for them.
            return await run_sync(_lookup, host, abandon_on_cancel=True, limiter=self._limiter)
        except (OSError, ValueError) as error:
            raise httpcore2.ConnectError(f"{host} cannot be resolved: {error}") from error


def _lookup(host: str) -> list[Address]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(address[0]) for *_, address in found))
