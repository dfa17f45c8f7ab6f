"""From the bytes of a request to a JSON object that may be looked at."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Request

from jobs.errors import RequestInvalid
from jobs.schema import webhook_of
from producer.gateway.errors import ApiError

# Deeper than any schema of use; whatever walks over a body may recurse so far.
MAX_DEPTH = 100


async def json_object(request: Request) -> dict[str, Any]:
    """The body, which must be a JSON object. Raises RequestInvalid, ApiError."""
    raw = await request.body()
    if not raw:
        raise RequestInvalid("body", "is empty; a JSON object is expected", "invalid_json")
    if caller := getattr(request.state, "caller", None):  # what somebody else may send is short
        await request.app.state.gateway.screen.check_body(caller.tenant_id, raw)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        message = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise RequestInvalid("body", message, "invalid_json") from None
    if not isinstance(body, dict):
        raise RequestInvalid("body", "must be a JSON object", "invalid_type")
    check_depth(body)
    return body


async def optional_json_object(request: Request) -> dict[str, Any]:
    """The same where a body may be left out."""
    return await json_object(request) if await request.body() else {}


def check_depth(body: Any) -> None:
    """Refuse what is nested too deep. Level by level: this itself does not recurse."""
    level = [body]
    for _ in range(MAX_DEPTH):
        level = [child for one in level for child in _children(one)]
        if not level:
            return
    raise RequestInvalid("body", f"is nested deeper than {MAX_DEPTH} levels")


def _children(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in values if isinstance(child, dict | list)]


def typed(body: dict[str, Any], name: str, kind: type, words: str) -> Any:
    """A field of that type, None if it is absent. Raises RequestInvalid."""
    value = body.get(name)
    if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise RequestInvalid(name, f"must be {words}", "invalid_type")
    return value


def required(body: dict[str, Any], name: str, kind: type, words: str) -> Any:
    """The same, and it must be there."""
    value = typed(body, name, kind, words)
    if value is None:
        raise RequestInvalid(name, "is missing", "missing_required_parameter")
    return value


def idempotency_key_of(request: Request) -> str | None:
    """The request's name, if it has one. Raises ApiError."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARACTERS:
        message = f"Idempotency-Key: must have 1 to {MAX_KEY_CHARACTERS} characters"
        raise ApiError(400, message, code="invalid_value", param="Idempotency-Key")
    return key


def webhook_in(body: dict[str, Any]) -> str | None:
    """The body's `webhook`, a field of ours that OpenAI's API has not. Raises RequestInvalid."""
    given = body.get("webhook")
    return None if given is None else webhook_of(given)


MAX_KEY_CHARACTERS = 200
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


def metadata_of(body: dict[str, Any]) -> dict[str, str]:
    """The metadata; an empty object if there are none. Raises RequestInvalid."""
    given = typed(body, "metadata", dict, "an object") or {}
    if len(given) > MAX_METADATA_PAIRS:
        raise RequestInvalid("metadata", f"may have at most {MAX_METADATA_PAIRS} pairs")
    for key, value in given.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY:
            raise RequestInvalid("metadata", f"a key has 1 to {MAX_METADATA_KEY} characters")
        if not isinstance(value, str):
            raise RequestInvalid(f"metadata.{key}", "must be a string", "invalid_type")
        if len(value) > MAX_METADATA_VALUE:
            raise RequestInvalid(f"metadata.{key}", f"may have at most {MAX_METADATA_VALUE} characters")
    return given


def limit_of(request: Request, default: int, most: int) -> int:
    """The query's `limit`. Raises ApiError."""
    given = request.query_params.get("limit", str(default))
    if not given.isascii() or not given.isdigit() or len(given) > len(str(most)) or not 1 <= int(given) <= most:
        raise ApiError(400, f"limit: must be 1 to {most}", code="invalid_value", param="limit")
    return int(given)


def order_of(request: Request) -> str:
    """The query's `order`: desc unless it says otherwise. Raises ApiError."""
    order = request.query_params.get("order", "desc")
    if order not in {"asc", "desc"}:
        raise ApiError(400, "order: must be asc or desc", code="invalid_value", param="order")
    return order
