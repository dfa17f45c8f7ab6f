"""`/v1/batches`."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response

from jobs.api_batches import ApiBatch, Counts
from jobs.errors import NotFound, RequestInvalid
from jobs.ids import new_id
from jobs.states import ApiBatchState
from producer.gateway.document import BATCH_BODY, query
from producer.gateway.errors import FINAL, ApiError, json_reply, not_found
from producer.gateway.files import expiry_seconds, found_file, optional_name, page, unix
from producer.gateway.intake import idempotency_key_of, json_object, limit_of, metadata_of, required, typed, webhook_in
from producer.gateway.names import BATCH, FILE, cursor_of, id_of, named
from producer.gateway.service import Reader, Submitter, Visitor, in_thread
from producer.openai.requests import ENDPOINTS

router = APIRouter(tags=["batches"])

WINDOW = "24h"
_TEXT = "a string"


@router.post("/v1/batches", openapi_extra=BATCH_BODY)
async def create(request: Request, visitor: Submitter) -> Response:
    """Make a batch of a file. What is wrong with the file is told by the batch, not here."""
    body = await json_object(request)
    endpoint = required(body, "endpoint", str, _TEXT)
    if endpoint not in ENDPOINTS:
        raise RequestInvalid("endpoint", f"must be one of {', '.join(ENDPOINTS)}")
    if required(body, "completion_window", str, _TEXT) != WINDOW:
        raise RequestInvalid("completion_window", f"must be {WINDOW}")
    metadata, seconds = metadata_of(body), _output_seconds(body)
    file = await found_file(visitor, required(body, "input_file_id", str, _TEXT), "input_file_id")
    work = partial(
        visitor.producer.api_batches.create,
        new_id(),
        visitor.tenant_id,
        endpoint=endpoint,
        input_file_id=file.id,
        metadata=metadata,
        output_seconds=seconds,
        idempotency_key=idempotency_key_of(request),
        models=visitor.key.models,
        webhook=webhook_in(body),
        key_id=None if visitor.key.quota_tokens_per_minute is None else visitor.key.id,
    )
    batch = await in_thread(work)
    visitor.gateway.runner.hurry()
    return json_reply(await _object(visitor, batch))


def _output_seconds(body: dict[str, Any]) -> int | None:
    asked = typed(body, "output_expires_after", dict, "an object")
    if asked is None:
        return None
    if asked.get("anchor") != "created_at":
        raise RequestInvalid("output_expires_after.anchor", "must be created_at")
    return expiry_seconds(asked.get("seconds"), "output_expires_after.seconds")


@router.get("/v1/batches", openapi_extra=query("limit", "after"))
async def list_batches(request: Request, visitor: Reader) -> Response:
    """List batches, the newest first."""
    limit = limit_of(request, 20, 100)
    after = cursor_of(BATCH, "batch", request.query_params.get("after"))
    work = partial(visitor.producer.api_batches.list, visitor.tenant_id, after=after, limit=limit + 1)
    return json_reply(page([await _object(visitor, batch) for batch in await in_thread(work)], limit))


@router.get("/v1/batches/{name}")
async def get_batch(name: str, visitor: Reader) -> Response:
    """Describe a batch."""
    batch_id = id_of(BATCH, "batch", name)
    return json_reply(await _object(visitor, await _found(visitor, batch_id, name)))


@router.post("/v1/batches/{name}/cancel")
async def cancel(name: str, visitor: Submitter) -> Response:
    """Stop a batch. What has ended so far is kept."""
    batch_id = id_of(BATCH, "batch", name)
    await _found(visitor, batch_id, name)
    batch = await in_thread(visitor.producer.api_batches.cancel, batch_id, visitor.tenant_id)
    if batch.state.final and batch.state is not ApiBatchState.CANCELLED:
        message = f"Cannot cancel a batch with status '{batch.state}'."
        raise ApiError(409, message, code="invalid_value", headers=FINAL)
    visitor.gateway.runner.hurry()
    return json_reply(await _object(visitor, batch))


async def _found(visitor: Visitor, batch_id: UUID, name: str) -> ApiBatch:
    try:
        return await in_thread(visitor.producer.api_batches.get, batch_id, visitor.tenant_id)
    except NotFound:
        raise not_found("batch", name) from None


async def _object(visitor: Visitor, batch: ApiBatch) -> dict[str, Any]:
    counts = batch.counts
    if batch.state in {ApiBatchState.IN_PROGRESS, ApiBatchState.CANCELLING}:
        counts = await in_thread(_counts_now, visitor, batch)
    return batch_object(batch, counts)


def _counts_now(visitor: Visitor, batch: ApiBatch) -> Counts:
    progress = visitor.producer.batches.progress(batch.id)
    return Counts(max(batch.counts.total, progress.total), progress.ended - progress.failed, progress.failed)


def batch_object(batch: ApiBatch, counts: Counts) -> dict[str, Any]:
    """A Batch."""
    stamps = {
        name: unix(getattr(batch, name))
        for name in (
            "in_progress_at",
            "finalizing_at",
            "completed_at",
            "failed_at",
            "expired_at",
            "cancelling_at",
            "cancelled_at",
            "expires_at",
        )
    }
    return {
        "id": named(BATCH, batch.id),
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": None if batch.errors is None else {"object": "list", "data": batch.errors},
        "input_file_id": named(FILE, batch.input_file_id),
        "completion_window": WINDOW,
        "status": str(batch.state),
        "output_file_id": optional_name(FILE, batch.output_file_id),
        "error_file_id": optional_name(FILE, batch.error_file_id),
        "created_at": unix(batch.created_at),
        **stamps,
        "request_counts": {"total": counts.total, "completed": counts.completed, "failed": counts.failed},
        "usage": _usage(counts) if batch.state.final else None,
        "metadata": batch.metadata,
    }


def _usage(counts: Counts) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counts.cached_tokens},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }
