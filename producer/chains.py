"""Responses that go on from one which has not ended: a task of every gateway lets them run once it has.

Until then such a job is blocked, and its request is what it asks itself. What was said before is put in front of that
when the answer before is there. Several gateways may come to the same job: one of them lets it go on.
"""

from __future__ import annotations

import asyncio
import logging

from anyio.to_thread import run_sync

from jobs.errors import NotFound, RequestInvalid, StoreUnavailable
from jobs.schema import Job, JobError, JobRequest, Message
from jobs.states import State
from jobs.store import Follower
from producer.client import Producer

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
_AT_ONCE = 100
_STRANDED = JobError(code="previous_response_not_found", message="the response that it goes on from has no answer")
_MISTAKE = JobError(code="server_error", message="its request cannot be put together")


def said_up_to(producer: Producer, job: Job, request: JobRequest) -> tuple[Message, ...]:
    """Everything that was said up to the answer of this job, it included."""
    before: list[dict[str, str]] = []
    if job.conversation is not None and job.turn is not None:
        items = producer.conversations.items(job.tenant_id, job.conversation, before_turn=job.turn)
        before = [item.message for item in items]
    said = tuple(Message.model_validate(message) for message in before)
    return (*said, *(request.messages or ()), Message(role="assistant", content=job.text))


class Chains:
    """Those of all tenants."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer

    async def run(self) -> None:
        """Look, again and again."""
        while True:
            try:
                found = await run_sync(self.run_once)
            except StoreUnavailable as error:
                log.warning("chained responses wait: %s", error)
                found = 0
            except Exception:  # nobody would start this again
                log.exception("chained responses wait")
                found = 0
            if not found:
                await asyncio.sleep(_LOOK_SECONDS)

    def run_once(self) -> int:
        """Let those go on that can; how many were found. Raises StoreUnavailable."""
        followers = self._producer.store.followers(_AT_ONCE)
        for follower in followers:
            producer = self._producer.for_tenant(follower.tenant_id)
            try:
                _go_on(producer, follower)
            except StoreUnavailable:
                raise
            except Exception:  # a mistake of ours over one must not keep the others
                log.exception("response %s", follower.id)
                producer.strand(follower.id, _MISTAKE)
        return len(followers)


def _go_on(producer: Producer, follower: Follower) -> None:
    try:
        before, request = producer.store.get_call(follower.after_id, follower.tenant_id, forgotten=True)
        if before.state is not State.SUCCEEDED:
            raise NotFound(_STRANDED.message)  # noqa: TRY301 - as if there were none
        job, asked = producer.store.get_call(follower.id, follower.tenant_id, forgotten=True)
        producer.release(job, said_up_to(producer, before, request), asked)
    except NotFound:
        producer.strand(follower.id, _STRANDED)
    except RequestInvalid as error:
        producer.strand(follower.id, JobError(code="invalid_request", message=str(error)))
