"""Waiting for a condition: the one place in the tests that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.01


def wait_until(predicate: Callable[[], T | None], timeout_seconds: float, what: str) -> T:
    """Poll until the predicate holds and return what it gave. Raises TimeoutError that says `what` was awaited."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_seconds:g} s still not: {what}")
        time.sleep(_POLL_SECONDS)
    return value
