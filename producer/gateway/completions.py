"""`/v1/chat/completions` and `/v1/completions`, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from jobs.errors import HeadraceError, RequestInvalid
from jobs.schema import Job, Usage
from producer.gateway.document import CHAT_BODY, COMPLETION_BODY
from producer.gateway.errors import ApiError, json_reply, of_job, translated
from producer.gateway.intake import idempotency_key_of, json_object, typed, webhook_in
from producer.gateway.running import PING, EventStream, Flight, Flights, Order, pieces_of, run
from producer.gateway.service import Submitter, Visitor
from producer.openai.chunks import Chunks
from producer.openai.objects import Object, answer
from producer.openai.requests import CHAT, COMPLETIONS, translate
from producer.telling import Diverged, Told

router = APIRouter(tags=["completions"])

# Each is a job of its own.
MAX_PROMPTS = 128


@dataclass(frozen=True, slots=True)
class _Form:
    """How the answer is wanted."""

    stream: bool
    with_usage: bool


@router.post(CHAT, openapi_extra=CHAT_BODY)
async def chat(request: Request, visitor: Submitter) -> Response:
    """Answer a chat."""
    body = await json_object(request)
    return await _answer(request, visitor, CHAT, body, [body])


@router.post(COMPLETIONS, openapi_extra=COMPLETION_BODY)
async def complete(request: Request, visitor: Submitter) -> Response:
    """Go on with a text, or with several."""
    body = await json_object(request)
    return await _answer(request, visitor, COMPLETIONS, body, list(_prompts(body)))


async def _answer(
    request: Request, visitor: Visitor, endpoint: str, body: dict[str, Any], bodies: Sequence[dict[str, Any]]
) -> Response:
    form = _form(body)
    key = idempotency_key_of(request)
    orders = [_order(endpoint, one, form, key, index) for index, one in enumerate(bodies)]
    if form.stream:
        return await _stream(visitor, endpoint, orders, form)
    jobs = await run(request, visitor, orders)
    for job in jobs:
        if error := of_job(job):
            raise error
    return json_reply(_merged([answer(job) for job in jobs]))


def _prompts(body: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """A body for each prompt: a list of texts or of lists of token ids holds several."""
    prompt = body.get("prompt")
    if not isinstance(prompt, list) or len(prompt) < 2 or all(type(one) is int for one in prompt):  # noqa: PLR2004
        return [body]
    if not all(isinstance(one, str) for one in prompt) and not all(isinstance(one, list) for one in prompt):
        raise RequestInvalid("prompt", "must be a text, token ids, or a list of either", "invalid_type")
    if len(prompt) > MAX_PROMPTS:
        raise RequestInvalid("prompt", f"may hold at most {MAX_PROMPTS} prompts")
    return [{**body, "prompt": [one]} for one in prompt]


def _form(body: dict[str, Any]) -> _Form:
    options = typed(body, "stream_options", dict, "an object") or {}
    stream = bool(typed(body, "stream", bool, "true or false"))
    with_usage = bool(typed(options, "include_usage", bool, "true or false"))
    return _Form(stream, with_usage)


def _order(endpoint: str, body: dict[str, Any], form: _Form, key: str | None, index: int) -> Order:
    asked = translate(endpoint, body)
    # What is echoed has log probabilities that are known at the end alone: it is told then, in one piece.
    if form.stream and not asked.request.echo:
        asked = replace(asked, request=asked.request.model_copy(update={"stream": True}))
    named = f"{key}#{index}" if key and index else key
    return Order(endpoint, asked, idempotency_key=named, webhook=webhook_in(body))


def _merged(answers: Sequence[Object]) -> Object:
    """One answer for several prompts: their choices one after the other."""
    first, *others = answers
    for other in others:
        start = len(first["choices"])
        first["choices"] += [choice | {"index": start + choice["index"]} for choice in other["choices"]]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            first["usage"][name] += other["usage"][name]
        first["usage"]["prompt_tokens_details"]["cached_tokens"] += other["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
    return first


# == streams ====================================================================================================


async def _stream(visitor: Visitor, endpoint: str, orders: Sequence[Order], form: _Form) -> Response:
    flights = Flights(visitor)
    started = await flights.start(orders)
    return EventStream(_events(visitor, endpoint, started, form), flights)


async def _events(visitor: Visitor, endpoint: str, flights: Sequence[Flight], form: _Form) -> AsyncIterator[bytes]:
    """Lines for all prompts, one after the other: their answers are computed side by side."""
    chunks = _chunks(endpoint, flights[0].job, form)
    usage = Usage()
    try:
        for number, flight in enumerate(flights):
            async for told in _choices(visitor, chunks, flight, number * flight.order.request.n):
                if isinstance(told, Job):
                    usage = _sum(usage, told.usage or Usage())
                else:
                    yield PING if told is None else _line(told)
        if form.with_usage:
            yield _line(chunks.usage(usage))
    except Exception as error:  # noqa: BLE001 - the reply has begun: all that is left is to say so in it
        yield _line(_failure(error).body)
        return
    yield b"data: [DONE]\n\n"


async def _choices(visitor: Visitor, chunks: Chunks, flight: Flight, start: int) -> AsyncIterator[Object | Job | None]:
    """The chunks of one prompt, and then its job. Raises ApiError if it has failed."""
    if chunks.endpoint == CHAT:
        for index in range(flight.order.request.n):
            yield chunks.first(start + index)
    written: dict[int, int] = {}
    async for told in pieces_of(visitor, flight.ear, flight.job.id):
        if isinstance(told, Told):
            offset = written.get(told.choice, 0)
            written[told.choice] = offset + len(told.text)
            yield chunks.text(start + told.choice, told.text, told.logprobs, offset)
        elif told is None:
            yield None
        else:
            for chunk in _ends(chunks, told, start):
                yield chunk
            yield told


def _ends(chunks: Chunks, job: Job, start: int) -> list[Object]:
    if error := of_job(job):
        raise error
    return [chunks.last(start + choice.index, choice) for choice in job.choices]


def _chunks(endpoint: str, job: Job, form: _Form) -> Chunks:
    name = ("chatcmpl-" if endpoint == CHAT else "cmpl-") + job.id.hex
    return Chunks(endpoint, name, int(job.created_at.timestamp()), job.model, form.with_usage)


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
    )


def _failure(error: Exception) -> ApiError:
    if isinstance(error, Diverged):
        message = "The request was begun anew by another worker, whose answer differs from what was sent already."
        return ApiError(500, message, kind="server_error", code="restarted")
    if isinstance(error, ApiError | HeadraceError):
        return translated(error)
    raise error


def _line(body: Object) -> bytes:
    # No `event:` lines, and these ends of lines: some tools look for nothing else.
    return b"data: " + orjson.dumps(body) + b"\n\n"
