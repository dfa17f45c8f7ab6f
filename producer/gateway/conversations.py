"""`/v1/conversations` and their items."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from jobs.conversations import Conversation, Conversations, Item
from jobs.errors import NotFound, RequestInvalid
from jobs.ids import new_id
from producer.gateway.document import CONVERSATION_BODY, ITEMS_BODY, METADATA_BODY, query
from producer.gateway.errors import json_reply, not_found
from producer.gateway.files import unix
from producer.gateway.intake import json_object, limit_of, metadata_of, optional_json_object, order_of
from producer.gateway.names import CONVERSATION, id_of, named
from producer.gateway.service import Reader, Submitter, Visitor, in_thread
from producer.openai.items import item_object, item_page, new_items

router = APIRouter(tags=["conversations"])


@router.post("/v1/conversations", openapi_extra=CONVERSATION_BODY)
async def create(request: Request, visitor: Submitter) -> Response:
    """Begin a conversation."""
    body = await optional_json_object(request)
    items, metadata = _screened(visitor, body), metadata_of(body)
    name = named(CONVERSATION, new_id())
    made = await in_thread(_of(visitor).create, visitor.tenant_id, name, metadata, items)
    return json_reply(conversation_object(made))


@router.get("/v1/conversations/{name}")
async def get_conversation(name: str, visitor: Reader) -> Response:
    """Describe a conversation."""
    return json_reply(conversation_object(await found_conversation(visitor, name)))


@router.post("/v1/conversations/{name}", openapi_extra=METADATA_BODY)
async def update(name: str, request: Request, visitor: Submitter) -> Response:
    """Replace a conversation's metadata."""
    metadata = metadata_of(await json_object(request))
    await found_conversation(visitor, name)
    return json_reply(conversation_object(await _asked(visitor, _of(visitor).set_metadata, name, metadata)))


@router.delete("/v1/conversations/{name}")
async def delete(name: str, visitor: Submitter) -> Response:
    """Delete a conversation. The responses in it stay."""
    await found_conversation(visitor, name)
    await _asked(visitor, _of(visitor).delete, name)
    return json_reply({"id": name, "object": "conversation.deleted", "deleted": True})


@router.post("/v1/conversations/{name}/items", openapi_extra=ITEMS_BODY)
async def add(name: str, request: Request, visitor: Submitter) -> Response:
    """Put items behind what is there."""
    items = _screened(visitor, await json_object(request))
    if not items:
        raise RequestInvalid("items", "is missing", "missing_required_parameter")
    await found_conversation(visitor, name)
    await _asked(visitor, _of(visitor).add, name, items)
    return json_reply(item_page(items, after=None, limit=len(items), ascending=True))


@router.get("/v1/conversations/{name}/items", openapi_extra=query("limit", "order", "after"))
async def list_items(name: str, request: Request, visitor: Reader) -> Response:
    """List a conversation's items, the newest first."""
    limit, ascending = limit_of(request, 20, 100), order_of(request) == "asc"
    await found_conversation(visitor, name)
    items = await _asked(visitor, _of(visitor).items, name)
    after = request.query_params.get("after")
    return json_reply(item_page(items, after=after, limit=limit, ascending=ascending))


@router.get("/v1/conversations/{name}/items/{item}")
async def get_item(name: str, item: str, visitor: Reader) -> Response:
    """One item."""
    await found_conversation(visitor, name)
    return json_reply(item_object(await _asked(visitor, _of(visitor).item, name, item)))


@router.delete("/v1/conversations/{name}/items/{item}")
async def delete_item(name: str, item: str, visitor: Submitter) -> Response:
    """Take an item out; later turns do not see it."""
    found = await found_conversation(visitor, name)
    await _asked(visitor, _of(visitor).remove, name, item)
    return json_reply(conversation_object(found))


def _of(visitor: Visitor) -> Conversations:
    return visitor.producer.conversations


async def _asked(visitor: Visitor, work: Any, name: str, *rest: Any) -> Any:
    """What that method says of the conversation. An unknown item raises ApiError."""
    try:
        return await in_thread(work, visitor.tenant_id, name, *rest)
    except NotFound:
        raise not_found("item", str(rest[0])[:100] if rest else name) from None


async def found_conversation(visitor: Visitor, name: str, param: str | None = None) -> Conversation:
    """The conversation. Raises ApiError."""
    id_of(CONVERSATION, "conversation", name, param)
    try:
        return await in_thread(_of(visitor).get, visitor.tenant_id, name)
    except NotFound:
        raise not_found("conversation", name, param) from None


def conversation_object(conversation: Conversation) -> dict[str, Any]:
    """A Conversation."""
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": unix(conversation.created_at),
        "metadata": conversation.metadata,
    }


def _screened(visitor: Visitor, body: dict[str, Any]) -> list[Item]:
    """They become part of prompts: the tenant's policy looks at them before they are stored."""
    return visitor.producer.validator.screened(new_items(body.get("items")))
