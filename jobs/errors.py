"""What can go wrong, and what becomes of the job.

HeadraceError
├── SettingsError          a setting is bad or missing; nothing starts            (exit 2)
├── RequestInvalid         the request is refused, no job exists                  (HTTP 400)
│   └── ModelUnknown       the same: no such model                                (HTTP 404)
├── Unauthorized           no such API key, or it was revoked                     (HTTP 401)
├── Forbidden              the key may not do this                                (HTTP 403)
├── QuotaExceeded          the key's tokens of this minute are used up; later     (HTTP 429)
├── NotFound               no such job, batch or conversation for this tenant     (HTTP 404)
├── IdempotencyConflict    the key was used with another body; no new job exists  (HTTP 409)
├── StoreUnavailable       Postgres did not answer in time; the job may or may not
│                          exist, and submitting it again with its id is safe     (HTTP 503)
├── WaitTimeout            the job goes on; only the waiting ended                (HTTP 504)
└── Fenced                 this worker lost its lease or its token; the job is somebody else's now
"""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose."""


class SettingsError(HeadraceError):
    """A setting is bad. `variable` is its name as the user wrote it."""

    def __init__(self, variable: str, message: str) -> None:
        super().__init__(f"{variable}: {message}")
        self.variable = variable


class RequestInvalid(HeadraceError):
    """The request is refused. `field` is the dotted path of the field at fault, such as `messages[0].role`."""

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.code = code


class ModelUnknown(RequestInvalid):
    """No model of that name is in the catalog."""

    def __init__(self, message: str) -> None:
        super().__init__("model", message, "model_not_found")


class Unauthorized(HeadraceError):
    """Nobody holds this key, or not any more."""


class Forbidden(HeadraceError):
    """The key is good, but not for this."""


class QuotaExceeded(HeadraceError):
    """Too many tokens within a minute. No job exists; `retry_after_seconds` (1 to 60) from now there is room again."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(f"{message}; try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class NotFound(HeadraceError):
    """No such row for this tenant."""


class IdempotencyConflict(HeadraceError):
    """The idempotency key or job id was used before with another request."""


class StoreUnavailable(HeadraceError):
    """Postgres did not answer in time."""


class WaitTimeout(HeadraceError):
    """The time to wait is over and the job has not ended."""


class Fenced(HeadraceError):
    """The lease or the token is no longer ours."""
