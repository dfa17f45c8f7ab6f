"""What a webhook says: the event of an end as OpenAI names it, signed as the Standard Webhooks are.

It names the job or batch and how it ended; what was asked and answered is for whoever holds a key.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from jobs.api_batches import ApiBatch
from jobs.schema import Job
from producer.openai.objects import Object, response_status
from producer.openai.requests import CHAT, COMPLETIONS, RESPONSES

# By the route a job came by: what it is called, and what is before its id. OpenAI has events of responses alone.
_KINDS = {
    CHAT: ("chat.completion", "chatcmpl-"),
    COMPLETIONS: ("completion", "cmpl-"),
    RESPONSES: ("response", "resp_"),
}


def event_of(ended: Job | ApiBatch, delivery_id: UUID) -> Object:
    """The event of this end; the same as often as it is told."""
    kind, name, moment = _batch(ended) if isinstance(ended, ApiBatch) else _job(ended)
    assert moment is not None, "only what has ended is told"
    return {
        "id": event_name(delivery_id),
        "object": "event",
        "created_at": int(moment.timestamp()),
        "type": kind,
        "data": {"id": name},
    }


def event_name(delivery_id: UUID) -> str:
    """By which a receiver knows an event that it has had before."""
    return f"evt_{delivery_id.hex}"


def _batch(batch: ApiBatch) -> tuple[str, str, datetime | None]:
    moment = batch.completed_at or batch.failed_at or batch.expired_at or batch.cancelled_at
    return f"batch.{batch.state}", f"batch_{batch.id.hex}", moment


def _job(job: Job) -> tuple[str, str, datetime | None]:
    if job.endpoint not in _KINDS:
        return f"job.{job.state}", str(job.id), job.finished_at
    kind, prefix = _KINDS[job.endpoint]
    return f"{kind}.{response_status(job)}", f"{prefix}{job.id.hex}", job.finished_at


def signed(delivery_id: UUID, body: bytes, unix_seconds: int, secrets: Sequence[str]) -> dict[str, str]:
    """The headers that prove a body: a signature for each secret, of which a receiver has one."""
    name, moment = event_name(delivery_id), str(unix_seconds)
    content = b".".join((name.encode(), moment.encode(), body))
    return {
        "webhook-id": name,
        "webhook-timestamp": moment,
        "webhook-signature": " ".join(f"v1,{_signature(secret, content)}" for secret in secrets),
    }


def _signature(secret: str, content: bytes) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return base64.b64encode(hmac.digest(key, content, "sha256")).decode()
