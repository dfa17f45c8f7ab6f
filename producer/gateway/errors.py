"""Every error of the gateway in the one form that clients of OpenAI's API expect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from jobs.errors import (
    Forbidden,
    IdempotencyConflict,
    ModelUnknown,
    NotFound,
    QuotaExceeded,
    RequestInvalid,
    StoreUnavailable,
    Unauthorized,
)
from jobs.schema import Job
from jobs.states import State
from producer.openai.objects import error_body

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"
# Clients honour 1 to 60; Python's gives up retrying above 120.
MOST_RETRY_SECONDS = 60
_STORE_RETRY_SECONDS = 5
# Clients try every 409, 429 and 5xx again unless they are told that this does not help.
FINAL: Mapping[str, str] = {"x-should-retry": "false"}


class ApiError(Exception):
    """A refusal, as it goes out."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The envelope."""
        return error_body(self.message, self.kind, self.param, self.code)


def not_found(what: str, name: str, param: str | None = None) -> ApiError:
    """An id that is unknown, or another tenant's: the answer is the same."""
    return ApiError(404, f"No {what} found with id {name!r}.", param=param)


def retry_after(seconds: float) -> dict[str, str]:
    """The header, within what clients honour."""
    return {"Retry-After": str(min(MOST_RETRY_SECONDS, max(1, round(seconds))))}


def json_reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, as clients want it."""
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def reply_to(error: ApiError) -> Response:
    """The error as a reply."""
    return json_reply(error.body, error.status, error.headers)


def translated(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestInvalid):
        status = 404 if isinstance(error, ModelUnknown) or error.code == "model_not_found" else 400
        return ApiError(status, str(error), code=error.code, param=error.field)
    for kind, make in _OURS.items():
        if isinstance(error, kind):
            return make(error)
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, f"{phrase}.", headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    return ApiError(500, "The server had an error while processing your request.", kind=SERVER, code=SERVER)


def _of_validation(error: RequestValidationError) -> ApiError:
    """A parameter of the query or path."""
    fault = error.errors()[0]
    name = str(fault["loc"][-1])
    return ApiError(400, f"{name}: {fault['msg']}", code="invalid_value", param=name)


_OURS: Mapping[type[Exception], Callable[[Any], ApiError]] = {
    NotFound: lambda error: ApiError(404, str(error)),
    IdempotencyConflict: lambda error: ApiError(409, str(error), code="idempotency_conflict", headers=FINAL),
    Unauthorized: lambda _: ApiError(401, "Incorrect API key provided.", code="invalid_api_key"),
    Forbidden: lambda error: ApiError(403, str(error), code="permission_denied"),
    QuotaExceeded: lambda error: ApiError(
        429,
        str(error),
        kind="tokens",
        code="rate_limit_exceeded",
        headers=retry_after(error.retry_after_seconds),
    ),
    StoreUnavailable: lambda _: ApiError(
        503,
        "The service is not available at the moment.",
        kind=SERVER,
        code="store_unavailable",
        headers=retry_after(_STORE_RETRY_SECONDS),
    ),
}


def of_job(job: Job) -> ApiError | None:
    """Why a job that has ended has no answer; None if it has one."""
    if job.state is State.SUCCEEDED:
        return None
    code = job.error.code if job.error else str(job.state)
    message = f"{code}: {job.error.message}" if job.error else f"The request was {job.state}."
    if code in {"invalid_request", "context_length_exceeded"}:
        return ApiError(400, message, code=code)
    # It was tried as often as it may be.
    return ApiError(500, message, kind=SERVER, code=code, headers=FINAL)


def install(app: FastAPI) -> None:
    """Have the application answer every error so."""

    async def answer(_: Request, error: Exception) -> Response:
        return reply_to(translated(error))

    for kind in (ApiError, RequestInvalid, HTTPException, RequestValidationError, *_OURS):
        app.add_exception_handler(kind, answer)
