"""The names of things on the wire, and the ids behind them."""

from __future__ import annotations

import re
from uuid import UUID

from producer.gateway.errors import ApiError, not_found

_HEX = re.compile(r"[0-9a-f]{32}")

FILE = "file-"
BATCH = "batch_"
RESPONSE = "resp_"
CONVERSATION = "conv_"


def named(prefix: str, one: UUID) -> str:
    """What clients call it."""
    return f"{prefix}{one.hex}"


def id_of(prefix: str, what: str, name: str, param: str | None = None) -> UUID:
    """The id that this name stands for; a name of another form is an unknown one. Raises ApiError."""
    digits = name.removeprefix(prefix)
    if not name.startswith(prefix) or not _HEX.fullmatch(digits):
        raise not_found(what, name[:100], param)
    return UUID(digits)


def cursor_of(prefix: str, what: str, name: str | None) -> UUID | None:
    """The id behind `after`. Raises ApiError."""
    try:
        return None if name is None else id_of(prefix, what, name, "after")
    except ApiError:
        raise ApiError(400, f"after: {name!r:.100} is no id of a {what}", code="invalid_value", param="after") from None
