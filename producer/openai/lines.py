"""The lines of OpenAI's batch files: in, `custom_id, method, url, body`; out, what the endpoint would have returned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from jobs.batches import Rejection
from jobs.errors import RequestInvalid
from jobs.states import State
from producer.openai.objects import Answered, Object, answer, error_body
from producer.openai.requests import ENDPOINTS

MAX_CUSTOM_ID_CHARACTERS = 512

_SHOWN_CHARACTERS = 60
_NOT_EXECUTED = {State.CANCELLED: "batch_cancelled", State.EXPIRED: "batch_expired"}
_WORKER_LOST = "worker_lost"


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a batch file."""

    url: str
    body: Mapping[str, Any]


def batch_line(fields: Mapping[str, Any]) -> BatchLine:
    """The request in a line. Raises RequestInvalid; what its body asks is looked at by `translate`."""
    for name in ("method", "url", "body"):
        if fields.get(name) is None:
            raise RequestInvalid(name, "is missing", "missing_required_parameter")
    if fields["method"] != "POST":
        raise RequestInvalid("method", "must be POST", "invalid_method")
    if not isinstance(fields["url"], str) or fields["url"] not in ENDPOINTS:
        shown = repr(fields["url"])[:_SHOWN_CHARACTERS]
        raise RequestInvalid("url", f"{shown} is none of {', '.join(ENDPOINTS)}", "invalid_url")
    if not isinstance(fields["body"], dict):
        raise RequestInvalid("body", "must be an object", "invalid_type")
    if fields["body"].get("webhook") is not None:
        raise RequestInvalid("webhook", "is for the batch as a whole, not for one of its requests")
    return BatchLine(fields["url"], fields["body"])


def custom_id(fields: Mapping[str, Any]) -> str | None:
    """The line's own name for itself, None if it has none. Raises RequestInvalid."""
    name = fields.get("custom_id")
    if name is None:
        return None
    if not isinstance(name, str):
        raise RequestInvalid("custom_id", "must be a string", "invalid_type")
    if not 1 <= len(name) <= MAX_CUSTOM_ID_CHARACTERS:
        raise RequestInvalid("custom_id", f"must have 1 to {MAX_CUSTOM_ID_CHARACTERS} characters")
    if "\0" in name:  # Postgres keeps no such text
        raise RequestInvalid("custom_id", "must not hold a NUL character")
    return name


def output_line(job: Answered) -> Object:
    """What became of one request; for the output file if it succeeded, else for the errors file."""
    line: Object = {"id": f"batch_req_{job.id.hex}", "custom_id": job.custom_id, "response": None, "error": None}
    if job.state is State.SUCCEEDED:
        return line | {"response": _reply(job.id.hex, 200, answer(job))}
    line |= {"line": job.line}
    code, message = _reason(job)
    if job.state in _NOT_EXECUTED:
        return line | {"error": {"code": _NOT_EXECUTED[job.state], "message": message}}
    if code == _WORKER_LOST:
        return line | {"error": {"code": code, "message": message}}
    status, kind = (400, "invalid_request_error") if code == "invalid_request" else (500, "server_error")
    return line | {"response": _reply(job.id.hex, status, error_body(message, kind, None, code))}


def rejected_line(batch_id: UUID, rejection: Rejection) -> Object:
    """A line that could not become a request, for the errors file; `line` counts from 1."""
    name = f"{batch_id.hex}_{rejection.number}"
    error = rejection.error
    status = 404 if error.code == "model_not_found" else 400
    body = error_body(error.message, "invalid_request_error", rejection.field, error.code)
    return {
        "id": f"batch_req_{name}",
        "custom_id": rejection.custom_id,
        "line": rejection.number,
        "response": _reply(name, status, body),
        "error": None,
    }


def _reply(name: str, status: int, body: Object) -> Object:
    return {"status_code": status, "request_id": f"req_{name}", "body": body}


def _reason(job: Answered) -> tuple[str, str]:
    if job.error is not None:
        return job.error.code, job.error.message
    return str(job.state), f"the request was {job.state}"
