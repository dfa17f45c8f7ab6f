"""`/v1/responses`: made, followed, cancelled, gone on from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import orjson
from fastapi import APIRouter, Request, Response

from jobs.errors import HeadraceError, NotFound, RequestInvalid
from jobs.schema import Call, Job, JobRequest, Message
from jobs.states import State
from producer.chains import said_up_to
from producer.following import Ear
from producer.gateway.conversations import found_conversation
from producer.gateway.document import RESPONSE_BODY, query
from producer.gateway.errors import ApiError, json_reply, not_found, translated
from producer.gateway.intake import idempotency_key_of, json_object, limit_of, order_of, typed, webhook_in
from producer.gateway.names import RESPONSE, id_of
from producer.gateway.running import PING, EventStream, Flights, Order, pieces_of, run
from producer.gateway.service import Reader, Submitter, Visitor, in_thread
from producer.openai.events import ResponseEvents
from producer.openai.items import input_items, item_page
from producer.openai.objects import response
from producer.openai.requests import RESPONSES, Asked, translate
from producer.telling import Diverged, Told

router = APIRouter(tags=["responses"])

_YES_NO = "true or false"
_GONE_ON_FROM = ("previous_response_id", "conversation")
# Fields of a response that are the request's, if it has them.
_ECHOED = (
    "instructions",
    "max_output_tokens",
    "temperature",
    "top_p",
    "top_logprobs",
    "truncation",
    "tool_choice",
    "parallel_tool_calls",
    "max_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "user",
)
_COMPLETION_WINDOWS = ("soonest", "2h", "8h")


@router.post("/v1/responses", openapi_extra=RESPONSE_BODY)
async def create(request: Request, visitor: Submitter) -> Response:
    """Answer; in the background, the response is there at once and its answer later."""
    body = await json_object(request)
    order = await _order(visitor, body, idempotency_key_of(request))
    if order.request.stream:
        return await _stream_new(visitor, order)
    if order.call is not None and order.call.background:
        return json_reply(response(await _begun(visitor, order)))
    [job] = await run(request, visitor, [order])
    return json_reply(response(job))


async def _begun(visitor: Visitor, order: Order) -> Job:
    """The job, accepted. It goes on by itself."""
    flights = Flights(visitor)
    try:
        [flight] = await flights.start([order])
        return flight.job
    finally:
        await flights.close()


# == what is asked ==============================================================================================


@dataclass(frozen=True, slots=True)
class _Context:
    """What came before."""

    messages: tuple[Message, ...] = ()  # of the response it goes on from
    previous: UUID | None = None
    conversation: str | None = None
    open: bool = False  # that response has not ended: what was said up to it is put in later


async def _order(visitor: Visitor, body: Mapping[str, Any], key: str | None) -> Order:
    given = {name: value for name, value in body.items() if value is not None}
    background = bool(typed(given, "background", bool, _YES_NO))
    stream = bool(typed(given, "stream", bool, _YES_NO))
    _check_options(given, background=background, stream=stream)
    stored = typed(given, "store", bool, _YES_NO)
    asked = translate(RESPONSES, {name: value for name, value in given.items() if name not in _GONE_ON_FROM})
    visitor.require_model(asked.request.model)
    context = await _context(visitor, given, background=background)
    own = len(asked.request.messages or ())
    call = Call(
        background=background,
        stored=stored is not False,
        previous=context.previous,
        own_messages=own if context.previous else None,
        echo=_echo(given),
    )
    after = context.previous if context.open else None
    return Order(RESPONSES, _in_context(asked, context, stream=stream), call, key, webhook_in(given), after)


def _check_options(given: dict[str, Any], *, background: bool, stream: bool) -> None:
    options = typed(given, "background_options", dict, "an object") or {}
    window = options.get("completion_window")
    if window not in (None, *_COMPLETION_WINDOWS):
        known = ", ".join(_COMPLETION_WINDOWS)
        raise RequestInvalid("background_options.completion_window", f"must be one of {known}")
    if window in _COMPLETION_WINDOWS[1:] and (stream or not background):
        raise RequestInvalid("background_options.completion_window", "needs `background` and no `stream`")
    if all(name in given for name in _GONE_ON_FROM):
        raise RequestInvalid("previous_response_id", "cannot be given together with `conversation`")


def _in_context(asked: Asked, context: _Context, *, stream: bool) -> Asked:
    request = asked.request
    update = {
        "messages": (*context.messages, *(request.messages or ())),
        "conversation": context.conversation,
        "stream": stream,
    }
    return replace(asked, request=request.model_copy(update=update))


def _echo(given: Mapping[str, Any]) -> dict[str, Any]:
    echoed = {name: given[name] for name in _ECHOED if name in given}
    text = given.get("text")
    return echoed | {"text": {"format": {"type": "text"}} | text} if isinstance(text, dict) else echoed


async def _context(visitor: Visitor, given: dict[str, Any], *, background: bool) -> _Context:
    conversation = given.get("conversation")
    if conversation is not None:
        name = conversation.get("id") if isinstance(conversation, dict) else conversation
        if not isinstance(name, str):
            raise RequestInvalid("conversation", "must be an id, or an object with one", "invalid_type")
        return _Context(conversation=(await found_conversation(visitor, name, "conversation")).id)
    previous = typed(given, "previous_response_id", str, "a string")
    if previous is None:
        return _Context()
    try:
        job, request = await _parent(visitor, previous, ended=not background)
    except ApiError:
        raise _no_previous(previous) from None
    if not job.state.final:
        return _Context(previous=job.id, open=True)
    return _Context(await in_thread(said_up_to, visitor.producer, job, request), previous=job.id)


def _no_previous(name: str) -> ApiError:
    return ApiError(
        400,
        f"Previous response with id {name[:100]!r} not found.",
        code="previous_response_not_found",
        param="previous_response_id",
    )


async def _parent(visitor: Visitor, name: str, *, ended: bool) -> tuple[Job, JobRequest]:
    """The response to go on from; `ended`: once it has. Raises ApiError if nobody can go on from it."""
    response_id = id_of(RESPONSE, "response", name)
    job, request = await _found(visitor, response_id, name)
    if job.call is not None and not job.call.stored:
        raise not_found("response", name)
    if ended and not job.state.final:
        visitor.turn.end()
        with visitor.gateway.follower.ear(response_id) as ear:
            await ear.end()
        job, request = await _found(visitor, response_id, name)
    if job.state.final and job.state is not State.SUCCEEDED:
        raise not_found("response", name)
    return job, request


@router.post("/v1/responses/input_tokens", openapi_extra=RESPONSE_BODY)
async def count_tokens(request: Request, visitor: Submitter) -> Response:
    """Count the tokens that a request would have."""
    body = await json_object(request)
    # Of one that goes on from a response that still runs, all is known once that has ended.
    order = await _order(visitor, body | {"background": None}, None)
    counted = order.request
    if counted.conversation is not None:
        items = await in_thread(visitor.producer.conversations.items, visitor.tenant_id, counted.conversation)
        said = tuple(Message.model_validate(item.message) for item in items)
        counted = counted.model_copy(update={"messages": (*said, *(counted.messages or ()))})
    tokens = await in_thread(visitor.producer.validator.prompt_tokens, counted)
    return json_reply({"object": "response.input_tokens", "input_tokens": tokens})


# == afterwards =================================================================================================


@router.get("/v1/responses/{name}", openapi_extra=query("stream", "starting_after"))
async def retrieve(name: str, request: Request, visitor: Reader) -> Response:
    """The response as it is now, or all of its events and those to come."""
    response_id = id_of(RESPONSE, "response", name)
    job, _ = await _found(visitor, response_id, name)
    if request.query_params.get("stream") not in {"true", "1"}:
        return json_reply(response(job))
    if job.call is None or not job.call.background:
        raise ApiError(400, "Only responses in the background can be streamed by id.", param="stream")
    return _stream_again(visitor, job, _starting_after(request))


def _starting_after(request: Request) -> int:
    given = request.query_params.get("starting_after", "-1")
    if given != "-1" and (not given.isascii() or not given.isdigit() or len(given) > 9):  # noqa: PLR2004
        raise RequestInvalid("starting_after", "must be a sequence number")
    return int(given)


@router.post("/v1/responses/{name}/cancel")
async def cancel(name: str, visitor: Submitter) -> Response:
    """Stop a response in the background. One that has ended stays as it is."""
    response_id = id_of(RESPONSE, "response", name)
    job, _ = await _found(visitor, response_id, name)
    if job.call is None or not job.call.background:
        message = "A response can only be cancelled if it was created with background=true."
        raise ApiError(400, message, code="invalid_value", param="background")
    if job.state.final:
        return json_reply(response(job))
    job = await in_thread(visitor.producer.cancel, response_id)
    if not job.state.final:  # its worker stops it within a step
        visitor.turn.end()
        with visitor.gateway.follower.ear(response_id) as ear:
            await ear.end()
        job, _ = await _found(visitor, response_id, name)
    return json_reply(response(job))


@router.delete("/v1/responses/{name}")
async def delete(name: str, visitor: Submitter) -> Response:
    """Delete a response. One that still runs is stopped."""
    response_id = id_of(RESPONSE, "response", name)
    job, _ = await _found(visitor, response_id, name)
    if not job.state.final:
        await in_thread(visitor.producer.cancel, response_id)
    if not await in_thread(visitor.producer.store.forget, response_id, visitor.tenant_id):
        raise not_found("response", name)
    return json_reply({"id": name, "object": "response", "deleted": True})


@router.get("/v1/responses/{name}/input_items", openapi_extra=query("limit", "order", "after"))
async def list_input_items(name: str, request: Request, visitor: Reader) -> Response:
    """List what was asked, the newest first."""
    limit, ascending = limit_of(request, 20, 100), order_of(request) == "asc"
    job, asked = await _found(visitor, id_of(RESPONSE, "response", name), name)
    after = request.query_params.get("after")
    return json_reply(item_page(input_items(job, asked), after=after, limit=limit, ascending=ascending))


async def _found(visitor: Visitor, response_id: UUID, name: str) -> tuple[Job, JobRequest]:
    """A response that may be seen. Raises ApiError."""
    try:
        job, request = await in_thread(visitor.producer.store.get_call, response_id, visitor.tenant_id)
    except NotFound:
        raise not_found("response", name) from None
    call = job.call or Call()
    if job.endpoint != RESPONSES or not (call.stored or call.background):
        raise not_found("response", name)
    return job, request


# == streams ====================================================================================================


async def _stream_new(visitor: Visitor, order: Order) -> Response:
    flights = Flights(visitor)
    [flight] = await flights.start([order])
    return EventStream(_events(visitor, flight.job, flight.ear, -1), flights)


def _stream_again(visitor: Visitor, job: Job, after: int) -> Response:
    flights = Flights(visitor)
    return EventStream(_events(visitor, job, flights.listen(job), after), flights)


async def _events(visitor: Visitor, job: Job, ear: Ear, after: int) -> AsyncIterator[bytes]:
    """The whole log behind a number, and what is to come."""
    events = ResponseEvents(job)
    for event in events.begin():
        if event["sequence_number"] > after:
            yield _line(event)
    try:
        async for told in pieces_of(visitor, ear, job.id):
            if told is None:
                yield PING
                continue
            for event in events.piece(told.text, told.logprobs) if isinstance(told, Told) else events.end(told):
                if event["sequence_number"] > after:
                    yield _line(event)
    except Diverged:
        message = "The response was begun anew by another worker, whose answer differs; retrieve it by its id."
        yield _line(events.error("server_error", message))
    except (ApiError, HeadraceError) as error:
        yield _line(events.error("server_error", translated(error).message))


def _line(event: Mapping[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), orjson.dumps(event))
