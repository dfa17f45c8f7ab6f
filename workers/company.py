"""Who is computed beside whom: all together, but a suspect alone.

When an engine dies, any of the jobs that it worked on may be to blame. None of them is charged; each runs again with no
other beside it, so that one that kills the engine again is charged alone, and fails when its attempts are used up. Its
neighbours finish.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK_SECONDS = 0.01


class Company:
    """Lets requests into the engine. `open_requests` says how many are in there."""

    def __init__(self, open_requests: Callable[[], int]) -> None:
        self._open_requests = open_requests
        self._door = threading.RLock()

    @contextmanager
    def together(self) -> Iterator[None]:
        """For as long as it takes to submit; waits while a suspect is alone, or waits for that."""
        with self._door:
            yield

    @contextmanager
    def alone(self, hurried: Callable[[], bool]) -> Iterator[None]:
        """For as long as one request is computed: first all others leave, unless it is `hurried`, and none comes in."""
        with self._door:
            while self._open_requests() and not hurried():
                time.sleep(_LOOK_SECONDS)
            yield
