"""What every request passes before a route sees it: a name, limits on its size, who is asking, and their share.

Plain ASGI, so that a request is looked at before any of its body is read, and a stream is not held up.
"""

from __future__ import annotations

import asyncio
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
from producer.gateway.shares import Share, Shares, Turn

log = logging.getLogger(__name__)

# Paths that need no key.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/login"})
OPEN_FOLDERS = ("/static/",)
# They answer whatever else goes on.
_PROBES = frozenset({"/health", "/ready"})
# All that somebody without a key has to say is a key.
_OPEN_BODY_BYTES = 10_000
# Requests of all those whom we do not know, together.
_STRANGERS = 64
# Keys that were good a moment ago, looked up again at a time.
_LOOKS = 8
# What the page asks; a session opens nothing else.
PAGE_FOLDER = "/ui/"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_CLOSE = {"Connection": "close"}
_BEARER = re.compile(r"Bearer +(\S{1,512}) *", re.IGNORECASE)


class Door:
    """The outermost layer of the application."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, sessions: Sessions, shares: Shares, body_bytes: int, file_bytes: int
    ) -> None:
        self._app = app
        self._keys = keys
        self._sessions = sessions
        self._body_bytes = body_bytes
        self._file_bytes = file_bytes
        self._shares = shares
        self._strangers = Share(_STRANGERS, _OPEN_BODY_BYTES * _STRANGERS, 0)
        self._looks = asyncio.Semaphore(_LOOKS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, send)
        try:
            _check_address(scope)
            limit = self._limit(scope)
            size = _check_body(Headers(scope=scope), limit)
            receive = _limited(receive, limit)
            if scope["path"] in _PROBES:
                await self._app(scope, receive, visit.send)
            elif _is_open(scope["path"]):
                await self._pass(self._strangers, size, scope, receive, visit)
            else:
                caller = scope["state"]["caller"] = await self._caller(scope)
                await self._pass(self._shares.of(caller.tenant_id), size, scope, receive, visit)
        except Exception as error:
            if not isinstance(error, ApiError | HeadraceError):
                log.exception("request %s failed", visit.name)
            if visit.begun:
                raise
            await reply_to(_parting(translated(error)))(scope, receive, visit.send)

    def _limit(self, scope: Scope) -> int:
        if _is_open(scope["path"]):
            return _OPEN_BODY_BYTES
        return self._file_bytes if _is_upload(scope) else self._body_bytes

    async def _pass(self, share: Share, size: int, scope: Scope, receive: Receive, visit: _Visit) -> None:
        """Through, in its turn. An upload takes as long as its sender takes, so it has none: it is read in pieces."""
        upload = _is_upload(scope)
        turn = visit.turn = scope["state"]["turn"] = Turn(share)
        with share.entered(size, upload=upload):
            try:
                if not upload:
                    receive = await _whole(receive)
                    await turn.begin()
                await self._app(scope, receive, visit.send)
            finally:
                turn.end()

    async def _caller(self, scope: Scope) -> ApiKey:
        """Raises Unauthorized, Forbidden."""
        digest = self._digest_in(scope)
        if digest is None or not self._keys.has_met(digest):
            return await self._stranger(digest)
        # Most requests come with a key that was seen a moment ago: they need no thread.
        return self._keys.remembered(digest) or await self._look_again(digest)

    async def _look_again(self, digest: bytes) -> ApiKey:
        async with self._looks:
            key = self._keys.remembered(digest)
            return await run_sync(self._keys.by_digest, digest) if key is None else key

    async def _stranger(self, digest: bytes | None) -> ApiKey:
        """The key of this digest, if there is one: in a share of those we have not met, however many they are."""
        turn = Turn(self._strangers)
        with self._strangers.entered(0, upload=False):
            await turn.begin()
            try:
                if digest is None:
                    raise Unauthorized("no key")  # noqa: TRY301 - it is paid for below
                return await run_sync(self._keys.by_digest, digest)
            except Unauthorized:
                turn.end(refused=True)
                raise
            finally:
                turn.end()

    def _digest_in(self, scope: Scope) -> bytes | None:
        """Of the key that the request shows, or whose session it is in. Raises Forbidden."""
        headers = Headers(scope=scope)
        if scope["path"].startswith(PAGE_FOLDER) and "authorization" not in headers:
            return self._digest_of_session(scope["method"], headers)
        bearer = _BEARER.fullmatch(headers.get("authorization", ""))
        return digest_of(bearer[1]) if bearer else None

    def _digest_of_session(self, method: str, headers: Mapping[str, str]) -> bytes | None:
        session = session_in(headers.get("cookie", ""))
        if session is None:
            return None
        try:
            digest = self._sessions.digest_in(session)
        except Unauthorized:
            return None
        if method not in _SAFE_METHODS and not self._sessions.has_csrf(session, headers.get(CSRF_HEADER)):
            raise Forbidden("this request does not come from our page")
        return digest


def _parting(refusal: ApiError) -> ApiError:
    """What was refused at the door may have a body that nobody reads: without this, a server reads on to its end."""
    refusal.headers |= _CLOSE
    return refusal


class _Visit:
    """One request's reply on its way out."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.name = f"req_{secrets.token_hex(16)}"
        self.begun = False
        self.turn: Turn | None = None
        self._send = send
        self._started = time.monotonic()
        scope.setdefault("state", {})["request_id"] = self.name

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            if self.turn is not None:
                self.turn.end(refused=_is_refusal(message["status"]))
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.name
            headers["openai-processing-ms"] = str(round(1000 * (time.monotonic() - self._started)))
            headers.setdefault("x-content-type-options", "nosniff")
        await self._send(message)


def _is_refusal(status: int) -> bool:
    """Whether this is the client's fault. To come too often is none that costs us much, and it has waited for that."""
    return 400 <= status < 500 and status not in {429, 499}  # noqa: PLR2004 - client errors


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def _is_upload(scope: Scope) -> bool:
    return (scope["method"], scope["path"]) == ("POST", "/v1/files")


def _check_address(scope: Scope) -> None:
    """No id and no parameter holds a NUL character, and Postgres takes none."""
    if "\0" in scope["path"] or b"%00" in scope["query_string"] or b"\0" in scope["query_string"]:
        raise ApiError(400, "The address holds a NUL character.", code="invalid_value", param="url")


def _check_body(headers: Mapping[str, str], limit: int) -> int:
    """How many bytes it has, at most."""
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(400, "A body must not be compressed.", code="invalid_value", param="content-encoding")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ApiError(400, "Content-Length must be a number.", code="invalid_value", param="content-length")
    if len(length.lstrip("0")) > len(str(limit)) or int(length) > limit:
        raise too_large(limit)
    return limit if "transfer-encoding" in headers else int(length)


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


async def _whole(receive: Receive) -> Receive:
    """The same, once the whole body is here: who sends it slowly keeps nobody waiting."""
    pieces: list[bytes] = []
    message: Message = {"type": "http.request", "more_body": True}
    while message["type"] == "http.request" and message.get("more_body", False):
        message = await receive()
        pieces.append(message.get("body", b""))
    given = False

    async def whole() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {**message, "body": b"".join(pieces)} if message["type"] == "http.request" else message

    return whole
