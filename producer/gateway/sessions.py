"""Sessions of the web page: a key is shown once, and a cookie stands for it from then on.

The cookie holds the digest of the key's secret and an end, signed: any gateway knows it, none keeps it, and it ends
with the key. It opens the page's own routes alone, and what changes anything needs a second word besides, which only a
page of ours can read (`SameSite` alone would trust every page of the same site).
"""

from __future__ import annotations

import time
from http.cookies import CookieError, SimpleCookie

from jobs.errors import Unauthorized
from jobs.keys import Keys, digest_of
from jobs.signing import Purpose, Signer

COOKIE = "headrace_session"
CSRF_HEADER = "x-csrf-token"
_SECONDS = 12 * 3600
_SEPARATOR = "."


class Sessions:
    """Makes sessions and knows them again."""

    def __init__(self, keys: Keys, secret: str) -> None:
        self._keys = keys
        self._signer = Signer(secret, Purpose.SESSIONS)

    def begin(self, key_secret: str) -> str:
        """A session for the holder of this key. Raises Unauthorized."""
        self._keys.authenticate(key_secret)
        told = f"{digest_of(key_secret).hex()}{_SEPARATOR}{int(time.time()) + _SECONDS}"
        return f"{told}{_SEPARATOR}{self._signer.sign('session', told)}"

    def digest_in(self, session: str) -> bytes:
        """The digest of the key that it stands for, if that is still one. Raises Unauthorized."""
        told, _, signature = session.rpartition(_SEPARATOR)
        digest, _, until = told.partition(_SEPARATOR)
        if not self._signer.knows(signature, "session", told) or int(until) < time.time():
            raise Unauthorized("no such session, or it is over")
        return bytes.fromhex(digest)

    def csrf_of(self, session: str) -> str:
        """The second word of this session."""
        return self._signer.sign("csrf", session)

    def has_csrf(self, session: str, word: str | None) -> bool:
        """Whether this is it."""
        return self._signer.knows(word, "csrf", session)


def session_in(cookies: str) -> str | None:
    """The session among a request's cookies."""
    try:
        found = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None


def cookie_for(session: str, *, secure: bool) -> str:
    """The header that gives it to a browser; an empty session takes it away."""
    parts = [f"{COOKIE}={session}", "Path=/", "HttpOnly", "SameSite=Strict", f"Max-Age={_SECONDS if session else 0}"]
    return "; ".join([*parts, "Secure"] if secure else parts)
