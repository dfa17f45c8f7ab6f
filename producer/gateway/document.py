"""What the OpenAPI document says that the routes themselves do not: bodies, parameters of queries, keys, errors.

The bounds of a request's fields are those of `JobRequest`, which checks them; nothing checks a body against this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from jobs.schema import JobRequest
from producer.openai.requests import CHAT, COMPLETIONS, ENDPOINTS, RESPONSES

Schema: TypeAlias = dict[str, Any]

_COMPONENTS = "#/components/schemas/"
_REQUEST = JobRequest.model_json_schema(ref_template=_COMPONENTS + "{model}")
_OF_REQUEST: Schema = _REQUEST["properties"]


def body(schema: Schema, *, required: bool = True, media: str = "application/json") -> Schema:
    """For a route's `openapi_extra`: what is to be sent."""
    return {"requestBody": {"required": required, "content": {media: {"schema": schema}}}}


def query(*names: str) -> Schema:
    """For a route's `openapi_extra`: the parameters it reads."""
    return {"parameters": [{"name": name, "in": "query", "schema": _QUERY[name]} for name in names]}


# == values =====================================================================================================

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _object(required: str = "", **properties: Schema) -> Schema:
    """`required` names fields, with spaces between them."""
    return {"type": "object", "properties": properties} | ({"required": required.split()} if required else {})


def _list(item: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": item, "minItems": 1} | bounds


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


_QUERY: dict[str, Schema] = {
    "after": _TEXT,
    "limit": {"type": "integer", "minimum": 1},
    "order": _one_of("asc", "desc"),
    "purpose": _TEXT,
    "starting_after": _COUNT,
    "stream": _FLAG,
}

# == requests ===================================================================================================

_PART = _object("type text", type=_one_of("text", "input_text", "output_text"), text=_TEXT)
_MESSAGE = _object(
    "role content",
    role=_one_of("system", "developer", "user", "assistant", "tool"),
    content=_either(_TEXT, _list(_PART)),
)
_TOKENS: Schema = _list({"type": "integer", "minimum": 0})
_STREAMED = {"stream": _FLAG, "stream_options": _object(include_usage=_FLAG)}
_LOGPROBS: Schema = _OF_REQUEST["logprobs"]
_EXPIRY = _object("anchor seconds", anchor=_one_of("created_at"), seconds=_COUNT)
_METADATA: Schema = _OF_REQUEST["metadata"]
_WEBHOOK: Schema = _OF_REQUEST["webhook"]
_ITEMS = _list(_MESSAGE, maxItems=20)

# What each endpoint takes besides the fields of a request.
_OWN: dict[str, Schema] = {
    CHAT: {"messages": _list(_MESSAGE), "logprobs": _FLAG, "top_logprobs": _LOGPROBS} | _STREAMED,
    COMPLETIONS: {
        "prompt": _either(_TEXT, _list(_TEXT), _TOKENS, _list(_TOKENS)),
        "best_of": _OF_REQUEST["n"],
        "echo": _FLAG,
        "logprobs": _LOGPROBS,
    }
    | _STREAMED,
    RESPONSES: {
        "input": _either(_TEXT, _list(_MESSAGE)),
        "instructions": _OF_REQUEST["instructions"],
        "background": _FLAG,
        "stream": _FLAG,
        "store": _FLAG,
        "previous_response_id": _TEXT,
        "conversation": _either(_TEXT, _object("id", id=_TEXT)),
        "text": _object(format=_object("type", type=_one_of("text", "json_object"))),
        "include": {"type": "array", "items": _TEXT},
        "top_logprobs": _LOGPROBS,
        "metadata": _METADATA,
    },
}


def _request(endpoint: str) -> Schema:
    route = ENDPOINTS[endpoint]
    fields = {"model": _OF_REQUEST["model"]} | dict.fromkeys(route.limits, _OF_REQUEST["max_tokens"])
    fields |= {name: _OF_REQUEST[name] for name in route.sampling}
    fields["webhook"] = _WEBHOOK
    fields["stop"] = _either(_TEXT, _OF_REQUEST["stop"])
    return _object(f"model {route.prompt_name}", **fields | _OWN[endpoint])


CHAT_BODY = body(_request(CHAT))
COMPLETION_BODY = body(_request(COMPLETIONS))
RESPONSE_BODY = body(_request(RESPONSES))

BATCH_BODY = body(
    _object(
        "input_file_id endpoint completion_window",
        input_file_id=_TEXT,
        endpoint=_one_of(*ENDPOINTS),
        completion_window=_one_of("24h"),
        metadata=_METADATA,
        output_expires_after=_EXPIRY,
        webhook=_WEBHOOK,
    )
)
FILE_BODY = body(
    _object("file purpose", file={"type": "string", "format": "binary"}, purpose=_one_of("batch", "user_data")),
    media="multipart/form-data",
)
CONVERSATION_BODY = body(_object(items=_ITEMS, metadata=_METADATA), required=False)
METADATA_BODY = body(_object("metadata", metadata=_METADATA))
ITEMS_BODY = body(_object("items", items=_ITEMS))

# == the whole ==================================================================================================

_NOTHING_OR_TEXT = {"type": ["string", "null"]}
_ERROR = _object(
    "error",
    error=_object(
        "message type param code",
        message=_TEXT,
        type=_TEXT,
        param=_NOTHING_OR_TEXT,
        code=_NOTHING_OR_TEXT,
    ),
)
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"description": "Refused, or failed.", "content": {"application/json": {"schema": _ERROR}}}
}


def documented(app: FastAPI, open_paths: frozenset[str]) -> Callable[[], Schema]:
    """A function that makes the document, once."""

    def document() -> Schema:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            components = made.setdefault("components", {})
            components["schemas"] = components.get("schemas", {}) | _REQUEST["$defs"]
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"key": []}]
            for path in open_paths & made["paths"].keys():
                for operation in made["paths"][path].values():
                    operation["security"] = []
            app.openapi_schema = made
        return app.openapi_schema

    return document
