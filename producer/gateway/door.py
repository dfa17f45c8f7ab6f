"""What every request passes before a route sees it: a name, limits on its size, and who is asking.

Plain ASGI, so that a request is looked at before any of its body is read, and a stream is not held up.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

from anyio.to_thread import run_sync
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import Forbidden, HeadraceError, Unauthorized
from jobs.keys import ApiKey, Keys, digest_of
from producer.gateway.errors import ApiError, reply_to, translated
from producer.gateway.sessions import CSRF_HEADER, Sessions, session_in

log = logging.getLogger(__name__)

# Paths that need no key.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/login"})
OPEN_FOLDERS = ("/static/",)
# What the page asks; a session opens nothing else.
PAGE_FOLDER = "/ui/"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_CLOSE = {"Connection": "close"}
_BEARER = re.compile(r"Bearer +(\S{1,512}) *", re.IGNORECASE)


class Door:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, *, keys: Keys, sessions: Sessions, body_bytes: int, file_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._sessions = sessions
        self._body_bytes = body_bytes
        self._file_bytes = file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, send)
        try:
            limit = self._file_bytes if _is_upload(scope) else self._body_bytes
            _check_address(scope)
            _check_body(Headers(scope=scope), limit)
            if not _is_open(scope["path"]):
                scope.setdefault("state", {})["caller"] = await self._caller(scope)
            await self._app(scope, _limited(receive, limit), visit.send)
        except Exception as error:
            if not isinstance(error, ApiError | HeadraceError):
                log.exception("request %s failed", visit.name)
            if visit.begun:
                raise
            await reply_to(_parting(translated(error)))(scope, receive, visit.send)

    async def _caller(self, scope: Scope) -> ApiKey:
        headers = Headers(scope=scope)
        if scope["path"].startswith(PAGE_FOLDER) and "authorization" not in headers:
            return await self._in_session(scope["method"], headers)
        bearer = _BEARER.fullmatch(headers.get("authorization", ""))
        if bearer is None:
            raise Unauthorized("no key")
        digest = digest_of(bearer[1])
        # Most requests come with a key that was seen a moment ago: they need no thread.
        key = self._keys.remembered(digest)
        return await run_sync(self._keys.by_digest, digest) if key is None else key

    async def _in_session(self, method: str, headers: Mapping[str, str]) -> ApiKey:
        """Whoever has signed in on the page. Raises Unauthorized, Forbidden."""
        session = session_in(headers.get("cookie", ""))
        if session is None:
            raise Unauthorized("no session")
        key = await run_sync(self._sessions.key_of, session)
        if method not in _SAFE_METHODS and not self._sessions.has_csrf(session, headers.get(CSRF_HEADER)):
            raise Forbidden("this request does not come from our page")
        return key


def _parting(refusal: ApiError) -> ApiError:
    """What was refused at the door may have a body that nobody reads: without this, a server reads on to its end."""
    refusal.headers |= _CLOSE
    return refusal


class _Visit:
    """One request's reply on its way out."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.name = f"req_{secrets.token_hex(16)}"
        self.begun = False
        self._send = send
        self._started = time.monotonic()
        scope.setdefault("state", {})["request_id"] = self.name

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.name
            headers["openai-processing-ms"] = str(round(1000 * (time.monotonic() - self._started)))
            headers.setdefault("x-content-type-options", "nosniff")
        await self._send(message)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def _is_upload(scope: Scope) -> bool:
    return (scope["method"], scope["path"]) == ("POST", "/v1/files")


def _check_address(scope: Scope) -> None:
    """No id and no parameter holds a NUL character, and Postgres takes none."""
    if "\0" in scope["path"] or b"%00" in scope["query_string"] or b"\0" in scope["query_string"]:
        raise ApiError(400, "The address holds a NUL character.", code="invalid_value", param="url")


def _check_body(headers: Mapping[str, str], limit: int) -> None:
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(400, "A body must not be compressed.", code="invalid_value", param="content-encoding")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ApiError(400, "Content-Length must be a number.", code="invalid_value", param="content-length")
    if len(length.lstrip("0")) > len(str(limit)) or int(length) > limit:
        raise too_large(limit)


def too_large(limit: int) -> ApiError:
    """The body is longer than what is accepted."""
    return ApiError(413, f"The body may have at most {limit:,} bytes.", code="request_too_large", headers=_CLOSE)


def _limited(receive: Receive, limit: int) -> Callable[[], Awaitable[Message]]:
    """The same, until the body is too long: its length may not have been told, or wrongly."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise too_large(limit)
        return message

    return limited
