"""Identifiers. Clients make them, so that a submit can be repeated safely."""

from __future__ import annotations

import hashlib
import os
import time
from functools import lru_cache
from uuid import UUID

_TIMESTAMP_BITS = 48
_RANDOM_BYTES = 10


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then random bits; ids made later sort later."""
    return _compose(time.time_ns() // 1_000_000, os.urandom(_RANDOM_BYTES), version=7)


@lru_cache(maxsize=4096)  # asked for more than once for each line of the chunk that is being taken in
def line_id(batch_id: UUID, custom_id: str) -> UUID:
    """The job id of one line of a batch, a UUIDv8: the batch's timestamp, then a digest of batch and `custom_id`.

    The same line always gets the same id, so taking a line in twice is seen by the primary key.
    """
    digest = hashlib.sha256(batch_id.bytes + custom_id.encode("utf-8", "surrogatepass")).digest()
    return _compose(batch_id.int >> (128 - _TIMESTAMP_BITS), digest[:_RANDOM_BYTES], version=8)


def _compose(milliseconds: int, tail: bytes, version: int) -> UUID:
    value = (milliseconds & (1 << _TIMESTAMP_BITS) - 1) << 80 | int.from_bytes(tail, "big")
    value = value & ~(0xF << 76) | version << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)
