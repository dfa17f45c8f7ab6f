"""Messages as items of responses and conversations, in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.conversations import Item, question_id
from jobs.errors import RequestInvalid
from jobs.ids import new_id
from jobs.schema import Job, JobRequest
from producer.openai.objects import Object, text_part
from producer.openai.requests import messages_of

MAX_ITEMS = 20


def item_object(item: Item) -> Object:
    """An item."""
    part = text_part(item.content) if item.role == "assistant" else {"type": "input_text", "text": item.content}
    return {
        "id": item.id,
        "type": "message",
        "role": item.role,
        "status": "completed",
        "content": [part],
    }


def new_items(given: Any) -> list[Item]:
    """Items that a caller puts into a conversation. Raises RequestInvalid."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise RequestInvalid("items", "must be a list", "invalid_type")
    if len(given) > MAX_ITEMS:
        raise RequestInvalid("items", f"may hold at most {MAX_ITEMS} items")
    messages = messages_of("items", given) if given else []
    return [Item(f"msg_{new_id().hex}", message["role"], message["content"]) for message in messages]


def input_items(job: Job, request: JobRequest) -> list[Item]:
    """A response's own input, in order."""
    messages = request.messages or ()
    own = job.call.own_messages if job.call and job.call.own_messages is not None else len(messages)
    first = len(messages) - own
    return [
        Item(question_id(job.id, index), message.role, message.content)
        for index, message in enumerate(messages)
        if index >= first
    ]


def item_page(items: Sequence[Item], *, after: str | None, limit: int, ascending: bool) -> Object:
    """One page of them. Raises RequestInvalid if `after` is none of them."""
    ordered = list(items) if ascending else list(reversed(items))
    if after is not None:
        places = [index for index, item in enumerate(ordered) if item.id == after]
        if not places:
            raise RequestInvalid("after", "is no id of an item")
        ordered = ordered[places[0] + 1 :]
    data = [item_object(item) for item in ordered[:limit]]
    return {
        "object": "list",
        "data": data,
        # The client's types want texts here, also of an empty list.
        "first_id": data[0]["id"] if data else "",
        "last_id": data[-1]["id"] if data else "",
        "has_more": len(ordered) > limit,
    }
