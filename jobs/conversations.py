"""Conversations and their items in SQL.

The items of a conversation are not a copy: those of its turns are read off the turns that succeeded, so that they are
there from the moment of the commit. Only what was put in by hand, and which items were taken out, has rows of its own.
An item of a turn is named after its job: `msg_<job>` is the answer, `msg_<job>_<n>` the n-th message of the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

from jobs.database import Database
from jobs.errors import NotFound

# Behind every turn: no conversation has so many.
ALL_TURNS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as its owner sees it."""

    id: str
    metadata: dict[str, str]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Item:
    """One message of a conversation."""

    id: str
    role: str
    content: str

    @property
    def message(self) -> dict[str, str]:
        """As a chat template takes it."""
        return {"role": self.role, "content": self.content}


class Conversations:
    """Every look at and change of a conversation, but for its turns, which are jobs."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self, tenant_id: str, conversation: str, metadata: dict[str, str], items: Sequence[Item]
    ) -> Conversation:
        """A new conversation with these items."""
        fields = _key(tenant_id, conversation) | {"metadata": orjson.dumps(metadata).decode()}

        def work(connection: Connection) -> None:
            connection.execute(_CREATE, fields)
            _add(connection, fields, items)

        self.database.run(work)
        return self.get(tenant_id, conversation)

    def get(self, tenant_id: str, conversation: str) -> Conversation:
        """The conversation. Raises NotFound."""
        return _found(self.database.row(_GET, _key(tenant_id, conversation)), conversation)

    def set_metadata(self, tenant_id: str, conversation: str, metadata: dict[str, str]) -> Conversation:
        """Replace its metadata. Raises NotFound."""
        fields = _key(tenant_id, conversation) | {"metadata": orjson.dumps(metadata).decode()}
        return _found(self.database.row(_SET_METADATA, fields), conversation)

    def delete(self, tenant_id: str, conversation: str) -> None:
        """Nobody sees it any more; its turns stay jobs. Raises NotFound."""
        _found(self.database.row(_DELETE, _key(tenant_id, conversation)), conversation)

    def add(self, tenant_id: str, conversation: str, items: Sequence[Item]) -> None:
        """Put items behind what is there, turns that have not ended included. Raises NotFound."""
        fields = _key(tenant_id, conversation)

        def work(connection: Connection) -> None:
            _found(connection.execute(_LOCK, fields).one_or_none(), conversation)
            _add(connection, fields, items)

        self.database.run(work)

    def remove(self, tenant_id: str, conversation: str, item_id: str) -> None:
        """Take an item out. Raises NotFound."""
        self.item(tenant_id, conversation, item_id)
        self.database.rows(_REMOVE, _key(tenant_id, conversation) | {"id": item_id})

    def item(self, tenant_id: str, conversation: str, item_id: str) -> Item:
        """One item. Raises NotFound."""
        for item in self.items(tenant_id, conversation):
            if item.id == item_id:
                return item
        raise NotFound(f"no item {item_id!r}")

    def items(self, tenant_id: str, conversation: str, *, before_turn: int = ALL_TURNS) -> list[Item]:
        """What a turn of this number has before it, oldest first."""
        fields = _key(tenant_id, conversation) | {"turn": before_turn}
        by_hand = self.database.rows(_BY_HAND, fields)
        removed = {row.id for row in by_hand if row.item is None}
        placed = [(row.after_turn, [_item(row.id, row.item)]) for row in by_hand if row.item is not None]
        turns = [(row.turn, _items_of_turn(row)) for row in self.database.rows(_TURNS, fields)]
        # A turn comes before what was put in behind it: sorting is stable.
        ordered = sorted([*turns, *placed], key=lambda one: one[0])
        return [item for _, items in ordered for item in items if item.id not in removed]


def question_id(job_id: UUID, index: int) -> str:
    """The name of one message of a job's question."""
    return f"msg_{job_id.hex}_{index}"


def answer_id(job_id: UUID) -> str:
    """The name of a job's answer."""
    return f"msg_{job_id.hex}"


def _items_of_turn(row: Any) -> list[Item]:
    asked = [_item(question_id(row.id, index), message) for index, message in enumerate(row.request["messages"])]
    return [*asked, Item(answer_id(row.id), "assistant", row.choices[0]["text"])]


def _item(item_id: str, message: dict[str, str]) -> Item:
    return Item(item_id, message["role"], message["content"])


def _add(connection: Connection, fields: dict[str, Any], items: Sequence[Item]) -> None:
    for item in items:
        connection.execute(_ADD, fields | {"id": item.id, "item": orjson.dumps(item.message).decode()})


def _key(tenant_id: str, conversation: str) -> dict[str, Any]:
    return {"tenant": tenant_id, "conversation": conversation}


def _found(row: Any, conversation: str) -> Conversation:
    if row is None:
        raise NotFound(f"no conversation {conversation!r}")
    return Conversation(row.id, row.metadata or {}, row.created_at)


_CREATE = text("""
INSERT INTO conversations (tenant_id, id, turns, metadata) VALUES (:tenant, :conversation, 0, CAST(:metadata AS json))
ON CONFLICT DO NOTHING
""")

_MINE = "tenant_id = :tenant AND id = :conversation AND deleted_at IS NULL"

_GET = text(f"SELECT id, metadata, created_at FROM conversations WHERE {_MINE}")  # noqa: S608 - composed of constants

_LOCK = text(f"SELECT id, metadata, created_at FROM conversations WHERE {_MINE} FOR UPDATE")  # noqa: S608

_SET_METADATA = text(f"""
UPDATE conversations SET metadata = CAST(:metadata AS json) WHERE {_MINE} RETURNING id, metadata, created_at
""")  # noqa: S608

_DELETE = text(f"""
UPDATE conversations SET deleted_at = now() WHERE {_MINE} RETURNING id, metadata, created_at
""")  # noqa: S608

_ADD = text("""
INSERT INTO conversation_items (tenant_id, conversation, id, after_turn, item)
SELECT tenant_id, id, :id, turns, CAST(:item AS json) FROM conversations
WHERE tenant_id = :tenant AND id = :conversation
""")

# An item of a turn has no row yet. Its place does not matter: it is not shown.
_REMOVE = text("""
INSERT INTO conversation_items (tenant_id, conversation, id, after_turn, deleted_at)
VALUES (:tenant, :conversation, :id, 0, now())
ON CONFLICT (tenant_id, conversation, id) DO UPDATE SET deleted_at = now(), item = NULL
""")

_BY_HAND = text("""
SELECT id, after_turn, item FROM conversation_items
WHERE tenant_id = :tenant AND conversation = :conversation AND after_turn < :turn
ORDER BY after_turn, position
""")

_TURNS = text("""
SELECT j.id, j.turn, p.request, r.choices
FROM jobs j JOIN payloads p ON p.job_id = j.id JOIN results r ON r.job_id = j.id
WHERE j.tenant_id = :tenant AND j.conversation = :conversation AND j.turn < :turn AND j.state = 'succeeded'
ORDER BY j.turn
""")
