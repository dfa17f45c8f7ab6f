"""What proves that something comes from one of us: HMAC-SHA256 under keys made from the one secret of the settings."""

from __future__ import annotations

import hmac
from enum import StrEnum

_DIGEST = "sha256"


class Purpose(StrEnum):
    """What a key is for: what is signed for one purpose proves nothing for another."""

    MESSAGES = "headrace messages"
    TENANTS = "headrace tenants"


def key_for(secret: str, purpose: Purpose) -> bytes:
    """The 32 bytes that sign for this purpose."""
    return hmac.digest(secret.encode(), purpose.encode(), _DIGEST)


class Signer:
    """Signs texts for one purpose, and knows its own signatures again."""

    def __init__(self, secret: str, purpose: Purpose) -> None:
        self._key = key_for(secret, purpose)

    def sign(self, *parts: str) -> str:
        """64 hexadecimal digits. No part may hold a NUL."""
        return hmac.digest(self._key, "\0".join(parts).encode(), _DIGEST).hex()

    def knows(self, signature: object, *parts: str) -> bool:
        """Whether it is ours, and of these parts. Takes as long for a wrong one as for a right one."""
        return isinstance(signature, str) and hmac.compare_digest(signature.encode(), self.sign(*parts).encode())
