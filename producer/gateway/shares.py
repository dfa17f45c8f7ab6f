"""What one tenant may have of this process at a time, so that whoever asks too much waits for themselves.

A request passes three bounds. It is one of `gateway_tenant_requests`, and its body has room in the tenant's memory, or
it is refused. Then it takes one of the tenant's turns: in its turn it is read, checked and submitted, or refused.
While it waits for its job it has none. A refusal costs the turn for longer than it took: however fast a tenant sends
what is refused, most of the process stays with the others. And what it does in threads, it does in a few of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from producer.gateway.errors import ApiError, retry_after

# Requests of a tenant that are read, checked and submitted together.
TURNS = 8
# Of the 40 threads of a process, and of the 8 connections to Postgres: the others find some free.
THREADS = 6
# So many bodies of the greatest length.
BODIES, UPLOADS = 8, 2
# With all turns full of refusals, they take one part in five of the time.
_PRICE = 4 * TURNS
_MOST_SECONDS = 5.0
# What a request costs before its turn.
_HEAD_SECONDS = 0.0005
_RETRY_SECONDS = 1
# Of the tenant whose request this is; None: of nobody.
_threads: ContextVar[asyncio.Semaphore | None] = ContextVar("threads", default=None)


class Share:
    """One tenant's. It belongs to the loop."""

    def __init__(self, requests: int, body_bytes: int, upload_bytes: int) -> None:
        self._most_requests = requests
        self._requests = 0
        self._bytes_left = {False: BODIES * body_bytes, True: UPLOADS * upload_bytes}  # by whether it is an upload
        self.turns = asyncio.Semaphore(TURNS)
        self.threads = asyncio.Semaphore(THREADS)

    @contextmanager
    def entered(self, body_bytes: int, *, upload: bool) -> Iterator[None]:
        """For the time of a request whose body has at most so many bytes. Raises ApiError."""
        if self._requests >= self._most_requests:
            raise _too_many(f"{self._requests:,} requests of this tenant are open already.")
        if self._bytes_left[upload] < body_bytes:
            raise _too_many("The bodies of this tenant's open requests are too long together.")
        self._requests += 1
        self._bytes_left[upload] -= body_bytes
        token = _threads.set(self.threads)
        try:
            yield
        finally:
            _threads.reset(token)
            self._requests -= 1
            self._bytes_left[upload] += body_bytes


class Turn:
    """A request's turn; `end` it once the request is accepted, or else refused. It may be ended again."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._began: float | None = None

    async def begin(self) -> None:
        """Wait for it."""
        await self._share.turns.acquire()
        self._began = time.monotonic()

    def end(self, *, refused: bool = False) -> None:
        """Let the tenant's next request have it, after a refusal later."""
        if self._began is None:
            return
        took_seconds, self._began = time.monotonic() - self._began, None
        if refused:
            seconds = min(_MOST_SECONDS, _PRICE * (_HEAD_SECONDS + took_seconds))
            asyncio.get_running_loop().call_later(seconds, self._share.turns.release)
        else:
            self._share.turns.release()


class Shares:
    """Every tenant's, while it is used. It belongs to the loop."""

    def __init__(self, requests: int, body_bytes: int, upload_bytes: int) -> None:
        self._bounds = (requests, body_bytes, upload_bytes)
        self._shares: dict[str, Share] = {}

    def of(self, tenant_id: str) -> Share:
        """The tenant's share."""
        share = self._shares.get(tenant_id)
        if share is None:
            share = self._shares[tenant_id] = Share(*self._bounds)
        return share


def threads_of_caller() -> AbstractAsyncContextManager[Any]:
    """For the time of some work in a thread."""
    return _threads.get() or nullcontext()


def _too_many(message: str) -> ApiError:
    return ApiError(429, message, kind="requests", code="rate_limit_exceeded", headers=retry_after(_RETRY_SECONDS))
