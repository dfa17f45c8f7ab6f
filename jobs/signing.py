"""What proves that something comes from one of us: HMAC-SHA256 under keys made from the one secret of the settings.

Whoever can write to Redis cannot thereby make a worker do anything: what has no good signature is refused. What has one
may come again, for a message is a hint, and a job that has started or ended does not start again.
"""

from __future__ import annotations

import hmac
import logging
import threading
from enum import StrEnum

log = logging.getLogger(__name__)

_DIGEST = "sha256"
# Whoever floods us with forgeries shall not fill the logs: each of the first, then one in so many.
_LOG_EACH = 10
_LOG_EVERY = 1_000


class Purpose(StrEnum):
    """What a key is for: what is signed for one purpose proves nothing for another."""

    MESSAGES = "headrace messages"
    TENANTS = "headrace tenants"
    SESSIONS = "headrace sessions"
    WEBHOOKS = "headrace webhooks"


def key_for(secret: str, purpose: Purpose) -> bytes:
    """The 32 bytes that sign for this purpose."""
    return hmac.digest(secret.encode(), purpose.encode(), _DIGEST)


class Signer:
    """Signs texts for one purpose, and knows its own signatures again."""

    def __init__(self, secret: str, purpose: Purpose) -> None:
        self._key = key_for(secret, purpose)

    def sign(self, *parts: str) -> str:
        """64 hexadecimal digits. No part but the last may hold a NUL."""
        return hmac.digest(self._key, "\0".join(parts).encode("utf-8", "surrogatepass"), _DIGEST).hex()

    def knows(self, signature: object, *parts: str) -> bool:
        """Whether it is ours, and of these parts. Takes as long for a wrong one as for a right one."""
        if not isinstance(signature, str) or not signature.isascii():
            return False
        return hmac.compare_digest(signature, self.sign(*parts))


class MessageSigner(Signer):
    """Signs the messages in Redis; refuses, counts and logs those that none of us signed."""

    def __init__(self, secret: str) -> None:
        super().__init__(secret, Purpose.MESSAGES)
        self.refused = 0  # since the start of this process
        self._lock = threading.Lock()

    def accepts(self, signature: object, kind: str, text: str) -> bool:
        """Whether one of us sent this text as this kind of message. Asked before anything is done about it."""
        known = self.knows(signature, kind, text)
        if not known:
            self._count(kind)
        return known

    def _count(self, kind: str) -> None:
        with self._lock:
            self.refused += 1
            refused = self.refused
        if refused <= _LOG_EACH or refused % _LOG_EVERY == 0:
            log.warning("refused a message %r that none of us signed; %d so far", kind, refused)
