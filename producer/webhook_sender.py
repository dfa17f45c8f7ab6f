"""Tells webhooks of ends: a task of every gateway's event loop, each of which takes whatever is due.

An attempt holds no thread and no connection to Postgres while it waits for its receiver. If its process dies, another
makes the next one. So an end is told at least once; a receiver knows a repeated one by its `webhook-id`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from http import HTTPStatus
from typing import Literal, TypeAlias

import httpcore2
import orjson
from anyio.to_thread import run_sync

from jobs.api_batches import ApiBatch
from jobs.errors import NotFound, StoreUnavailable
from jobs.schema import Job
from jobs.webhooks import Delivery
from producer.client import Producer
from producer.openai.webhooks import event_of, signed
from producer.public_network import PublicNetwork

log = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["delivered", "failed", "given_up"]
Headers: TypeAlias = dict[bytes | str, bytes | str]

_LOOK_SECONDS = 0.5
# At once in a process. So many of a tenant's keep it from getting more: one whose receivers are silent leaves room.
_SLOTS = 64
_SLOTS_OF_TENANT = 16
_CONNECT_SECONDS = 5.0
_TOTAL_SECONDS = 20.0
# An attempt that was not heard of for so long is lost. Longer than the longest, with what it notes in Postgres.
_LEASE_SECONDS = 60.0
# 5 s, 20 s, 80 s, ... up to 6 h, each at least half of it: the last one is a day and a half after the first.
MAX_ATTEMPTS = 12
_FIRST_DELAY_SECONDS = 5.0
_DELAY_FACTOR = 4
_MOST_DELAY_SECONDS = 21_600.0
_MAX_ERROR_CHARACTERS = 200

_HEADERS: Headers = {"content-type": "application/json", "user-agent": "headrace"}
_TIMEOUTS = {"connect": _CONNECT_SECONDS, "read": _TOTAL_SECONDS, "write": _TOTAL_SECONDS, "pool": _TOTAL_SECONDS}


class _Refused(Exception):
    """The receiver does not have it. `final`: and wants no more of it."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class WebhookSender:
    """One process's. `run` it until it is cancelled. `attempts` counts what came of those it has noted."""

    def __init__(self, producer: Producer, network: httpcore2.AsyncNetworkBackend | None = None) -> None:
        self._producer = producer
        self._webhooks = producer.webhooks
        self._network = network or PublicNetwork(producer.settings.webhook_networks)
        self._under_way: dict[asyncio.Task[None], str] = {}  # and whose they are
        self.attempts: Counter[Outcome] = Counter()

    async def run(self) -> None:
        """Send what is due, again and again. What is under way at the end is made again by others."""
        # Redirects are not followed, no proxy is asked, and no connection is kept: each attempt resolves anew.
        pool = httpcore2.AsyncConnectionPool(
            network_backend=self._network, max_connections=None, max_keepalive_connections=0
        )
        async with pool:
            try:
                while True:
                    if not await self._begin_some(pool):
                        await asyncio.sleep(_LOOK_SECONDS)
            finally:
                for task in self._under_way:
                    task.cancel()
                await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _begin_some(self, pool: httpcore2.AsyncConnectionPool) -> bool:
        free = min(_SLOTS - len(self._under_way), _SLOTS_OF_TENANT)
        if not free:
            return False
        counts = Counter(self._under_way.values())
        busy = [tenant_id for tenant_id, count in counts.items() if count >= _SLOTS_OF_TENANT]
        try:
            taken = await run_sync(self._webhooks.take, free, _LEASE_SECONDS, busy)
        except StoreUnavailable as error:
            log.warning("webhooks wait: %s", error)
            return False
        except Exception:
            log.exception("webhooks wait")
            return False
        for delivery in taken:
            task = asyncio.create_task(self._attempt(pool, delivery))
            self._under_way[task] = delivery.tenant_id
            task.add_done_callback(self._under_way.pop)
        return bool(taken)

    async def _attempt(self, pool: httpcore2.AsyncConnectionPool, delivery: Delivery) -> None:
        try:
            body, headers = await run_sync(self._prepared, delivery)
            try:
                await _post(pool, delivery.url, body, headers)
            except _Refused as refused:
                self.attempts[await run_sync(self._note_failure, delivery, refused)] += 1
            else:
                await run_sync(self._webhooks.delivered, delivery)
                self.attempts["delivered"] += 1
        except NotFound:
            log.info("webhook %s is not told: what ended was deleted meanwhile", delivery.id)
        except StoreUnavailable as error:
            log.warning("webhook %s is told again: %s", delivery.id, error)
        except Exception:  # its lease ends, and another attempt is made; the others must not end with it
            log.exception("webhook %s", delivery.id)

    def _prepared(self, delivery: Delivery) -> tuple[bytes, Headers]:
        """Raises NotFound."""
        body = orjson.dumps(event_of(self._ended(delivery), delivery.id))
        secrets = self._webhooks.secrets(delivery.tenant_id)
        headers: Headers = dict(_HEADERS)
        headers.update(signed(delivery.id, body, int(time.time()), secrets).items())
        return body, headers

    def _ended(self, delivery: Delivery) -> Job | ApiBatch:
        producer = self._producer.for_tenant(delivery.tenant_id)
        if delivery.job_id is not None:
            return producer.get(delivery.job_id)
        assert delivery.batch_id is not None
        return producer.api_batches.get(delivery.batch_id, delivery.tenant_id)

    def _note_failure(self, delivery: Delivery, refused: _Refused) -> Outcome:
        over = refused.final or delivery.attempts >= MAX_ATTEMPTS
        delay = None if over else delay_seconds(delivery.attempts)
        # No URL in a log: some carry a secret.
        log.info("webhook %s, attempt %d: %s", delivery.id, delivery.attempts, refused)
        self._webhooks.failed(delivery, str(refused)[:_MAX_ERROR_CHARACTERS], delay)
        return "given_up" if over else "failed"


def delay_seconds(attempts: int) -> float:
    """How long after the last of so many attempts the next one is made."""
    longest = min(_FIRST_DELAY_SECONDS * _DELAY_FACTOR ** (attempts - 1), _MOST_DELAY_SECONDS)
    return random.uniform(longest / 2, longest)  # noqa: S311 - no secret


async def _post(pool: httpcore2.AsyncConnectionPool, url: str, body: bytes, headers: Headers) -> None:
    """Returns when the receiver has it. Raises _Refused."""
    extensions = {"timeout": _TIMEOUTS}
    try:
        async with (
            asyncio.timeout(_TOTAL_SECONDS),
            # Nothing is read but the head of the answer, which the library bounds.
            pool.stream("POST", url, headers=headers, content=body, extensions=extensions) as answer,
        ):
            status = answer.status
    except (TimeoutError, httpcore2.TimeoutException):
        raise _Refused(f"no answer within {_TOTAL_SECONDS:g} s") from None
    except Exception as error:  # noqa: BLE001 - whatever a strange URL or receiver brings the library to
        raise _Refused(f"{type(error).__name__}: {error}") from None
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        raise _Refused(f"the receiver answered {status}", final=status == HTTPStatus.GONE)
