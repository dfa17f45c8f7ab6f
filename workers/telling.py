"""Passes the pieces of streamed answers on: one thread, and while one write is under way the next ones collect.

Jobs that are not streamed never come here.
"""

from __future__ import annotations

import queue
import threading
from uuid import UUID

from jobs.streams import Piece, Streams

_GROUP = 1_000


class PieceTeller:
    """Writes pieces to Redis in the order they come. What Redis does not take is told from the result."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._queue: queue.SimpleQueue[tuple[UUID, Piece] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="piece-teller", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def tell(self, job_id: UUID, piece: Piece) -> None:
        """Queue one; does not block."""
        self._queue.put((job_id, piece))

    def close(self) -> None:
        """Write what is queued, then end."""
        self._queue.put(None)
        self._thread.join()
        self._streams.close()

    def _run(self) -> None:
        group: list[tuple[UUID, Piece]] = []
        while (one := self._queue.get()) is not None:
            group.append(one)
            if len(group) == _GROUP or self._queue.empty():
                self._streams.append(group)
                group = []
        if group:
            self._streams.append(group)
