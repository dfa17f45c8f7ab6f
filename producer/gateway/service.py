"""What the routes share: the gateway's own parts, and who is asking."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from anyio.to_thread import run_sync
from fastapi import Depends, Request

from jobs.errors import ModelUnknown
from jobs.keys import ApiKey, Role
from jobs.schema import JobRequest
from producer.batch_runs import BatchRunner
from producer.chains import Chains
from producer.client import Producer
from producer.following import Follower
from producer.gateway.admission import Admission
from producer.gateway.screening import Screen
from producer.gateway.sessions import Sessions
from producer.gateway.shares import Turn, threads_of_caller
from producer.validation import catalog_of
from producer.webhook_sender import WebhookSender

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gateway:
    """One process's parts."""

    producer: Producer
    follower: Follower
    admission: Admission
    runner: BatchRunner
    sessions: Sessions
    screen: Screen
    webhooks: WebhookSender
    configured: frozenset[str]  # names of models that have a table, or come with us

    def models(self) -> list[str]:
        """What can be asked for: what is configured, and what a worker serves besides."""
        return sorted(self.configured | self.admission.served)


@asynccontextmanager
async def opened(producer: Producer, sessions: Sessions) -> AsyncIterator[Gateway]:
    """The gateway's parts, at work."""
    admission = Admission(producer)
    configured = frozenset(catalog_of(producer.settings).names())
    runner = BatchRunner(producer, lambda model: model in configured or model in admission.served)
    async with Follower(producer) as follower, Screen() as screen:
        webhooks = WebhookSender(producer)
        tasks = [asyncio.create_task(work) for work in (admission.run(), webhooks.run(), Chains(producer).run())]
        runner.start()
        try:
            yield Gateway(producer, follower, admission, runner, sessions, screen, webhooks, configured)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await run_sync(runner.close)


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks, and what acts for them."""

    gateway: Gateway
    key: ApiKey
    producer: Producer  # for the key's tenant, within its models and quota
    turn: Turn  # ended before anything is waited for but our own servers

    @property
    def tenant_id(self) -> str:
        """Whose rows these are."""
        return self.key.tenant_id

    def check(self, request: JobRequest) -> JobRequest:
        """A request against its model. Raises RequestInvalid, Forbidden."""
        self.require_model(request.model)
        return self.producer.validator.check(request)

    def require_model(self, model: str) -> None:
        """Raises ModelUnknown, Forbidden.

        Elsewhere any folder or hub id is a model; a stranger must not have us look for files by name.
        """
        if model not in self.gateway.configured and model not in self.gateway.admission.served:
            raise ModelUnknown(f"The model {model!r} does not exist.")
        self.key.require_model(model)


def visitor_with(role: Role) -> Callable[..., Any]:
    """A dependency: the visitor, who must have this role."""

    async def visit(request: Request) -> Visitor:
        gateway, key = request.app.state.gateway, request.state.caller
        key.require(role)
        return Visitor(gateway, key, gateway.producer.for_key(key), request.state.turn)

    return visit


MAY_READ = Depends(visitor_with(Role.READ))
MAY_ADMINISTER = Depends(visitor_with(Role.ADMIN))
Submitter = Annotated[Visitor, Depends(visitor_with(Role.SUBMIT))]
Reader = Annotated[Visitor, MAY_READ]


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """What waits for Postgres or Redis, or counts tokens: not in the loop. It is within the share of whoever asks."""
    async with threads_of_caller():
        return await run_sync(work, *arguments)
