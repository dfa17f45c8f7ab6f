"""A foreground request: its jobs are submitted, awaited without a thread, and cancelled if the client goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from anyio import CancelScope
from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jobs.errors import HeadraceError, RequestInvalid
from jobs.ids import new_id
from jobs.schema import Call, Job, JobRequest
from producer.following import Ear
from producer.gateway.errors import ApiError
from producer.gateway.service import Visitor, in_thread
from producer.openai.requests import Asked, renamed
from producer.telling import Teller, Told

log = logging.getLogger(__name__)

# Proxies close what is silent for a minute.
_PING_SECONDS = 15.0
PING = b": ping\n\n"


@dataclass(frozen=True, slots=True)
class Order:
    """One job to be made of a request."""

    endpoint: str
    asked: Asked
    call: Call | None = None
    idempotency_key: str | None = None
    webhook: str | None = None
    after: UUID | None = None  # the job that it goes on from, if that has not ended

    @property
    def stays(self) -> bool:
        """Whether the job goes on when its client goes: who names a request means to come back for it."""
        return self.idempotency_key is not None or (self.call is not None and self.call.background)

    @property
    def request(self) -> JobRequest:
        """What is to be run."""
        named = {"idempotency_key": self.idempotency_key, "webhook": self.webhook}
        given = {name: value for name, value in named.items() if value is not None}
        return self.asked.request.model_copy(update=given) if given else self.asked.request


@dataclass(slots=True)
class Flight:
    """A submitted job, and the ear at it."""

    order: Order
    job: Job
    ear: Ear


class Flights:
    """The jobs of one request. Close it when the request is over: what has not ended and does not stay is cancelled."""

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor
        self._ears = ExitStack()
        self._all: list[Flight] = []

    async def start(self, orders: Sequence[Order]) -> list[Flight]:
        """Submit all. Raises ApiError, RequestInvalid in the caller's terms, and what `Producer.submit` raises."""
        model = orders[0].request.model
        self._visitor.require_model(model)
        for order in orders:
            await self._screen(order)
        foreground = orders[0].call is None or not orders[0].call.background
        await self._visitor.gateway.admission.admit(model, foreground=foreground, jobs=len(orders))
        try:
            for order in orders:
                self._all.append(await self._start(order))
        except BaseException:
            await self.close()
            raise
        self._visitor.turn.end()
        return self._all

    async def _screen(self, order: Order) -> None:
        visitor = self._visitor
        try:
            await visitor.gateway.screen.check_structure(visitor.tenant_id, order.request)
        except RequestInvalid as error:
            raise renamed(error, order.asked.names) from None

    async def _start(self, order: Order) -> Flight:
        job_id = new_id()
        # Listening begins before the submit, so that nothing is missed.
        ear = self._listen(job_id, streamed=order.request.stream)
        job = await in_thread(partial(self._submit, order, job_id))
        if job.id != job_id:  # the same request was accepted before
            ear = self._listen(job.id, streamed=order.request.stream)
        if job.state.final:
            ear.hear_end()
        return Flight(order, job, ear)

    def listen(self, job: Job) -> Ear:
        """An ear at a job that was submitted before, whose pieces are wanted."""
        ear = self._listen(job.id, streamed=True)
        if job.state.final:
            ear.hear_end()
        return ear

    def _listen(self, job_id: UUID, *, streamed: bool) -> Ear:
        return self._ears.enter_context(self._visitor.gateway.follower.ear(job_id, streamed=streamed))

    def _submit(self, order: Order, job_id: UUID) -> Job:
        try:
            return self._visitor.producer.submit(
                order.request, job_id=job_id, endpoint=order.endpoint, call=order.call, after=order.after
            )
        except RequestInvalid as error:
            raise renamed(error, order.asked.names) from None

    async def close(self) -> None:
        """Cancel what has not ended."""
        with CancelScope(shield=True):
            for flight in self._all:
                if not flight.ear.ended and not flight.order.stays:
                    await self._cancel(flight.job.id)
        self._ears.close()

    async def _cancel(self, job_id: UUID) -> None:
        try:
            await in_thread(self._visitor.producer.cancel, job_id)
        except HeadraceError as error:
            log.warning("job %s, whose client has gone, cannot be cancelled: %s", job_id, error)


class ClientGone(ApiError):
    """Nobody is there to be answered."""

    def __init__(self) -> None:
        super().__init__(499, "The client has closed the request.")


async def run(request: Request, visitor: Visitor, orders: Sequence[Order]) -> list[Job]:
    """The ended jobs, in order. If the client goes meanwhile they are cancelled."""
    flights = Flights(visitor)
    try:
        started = await flights.start(orders)
        await unless_gone(request, asyncio.gather(*(flight.ear.end() for flight in started)))
        return [await in_thread(visitor.producer.get, flight.job.id) for flight in started]
    finally:
        await flights.close()


async def unless_gone(request: Request, work: asyncio.Future[Any]) -> None:
    """Wait for it. Raises ClientGone if the client closes the connection before."""
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.gather(gone, work, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def pieces_of(visitor: Visitor, ear: Ear, job_id: UUID) -> AsyncIterator[Told | Job | None]:
    """The answer's pieces as they are written, and then the job. None: nothing new for a while. Raises Diverged."""
    teller = Teller()
    while True:
        try:
            pieces = await asyncio.wait_for(ear.pieces(), _PING_SECONDS)
        except TimeoutError:
            yield None
            continue
        for told in teller.take(pieces):
            yield told
        if not pieces:
            break
    job = await in_thread(visitor.producer.get, job_id)
    for told in teller.rest(job):
        yield told
    yield job


class EventStream(StreamingResponse):
    """Server-sent events of a request, which is closed however they end."""

    def __init__(self, events: AsyncIterator[bytes], flights: Flights) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._flights = flights

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._flights.close()
