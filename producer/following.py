"""Waits for jobs in an event loop: a wait holds neither a thread nor a connection.

    async with Follower(producer) as follower:
        with follower.ear(job_id) as ear:
            job = producer.submit(..., job_id=job_id)
            await ear.end()

One thread for each kind of signal wakes all who wait. What was not heard is looked for, for all of them at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self
from uuid import UUID

from anyio.to_thread import run_sync

from jobs.errors import StoreUnavailable
from jobs.signals import ENDED, TOLD, Signals
from jobs.streams import BEGINNING, Piece, Streams
from producer.client import Producer

_LOOK_SECONDS = 0.2
_LOOK_WITH_SIGNALS_SECONDS = 1.0


class Ear:
    """One wait for one job. It belongs to the loop."""

    def __init__(self, job_id: UUID, *, streamed: bool) -> None:
        self.job_id = job_id
        self.streamed = streamed
        self.ended = False
        self.position = BEGINNING
        self._pieces: list[Piece] = []
        self._news = asyncio.Event()

    async def end(self) -> None:
        """Return once the job has ended."""
        while not self.ended:
            await self._news.wait()
            self._news.clear()

    async def pieces(self) -> list[Piece]:
        """The next pieces, at least one; none are left once the job has ended."""
        while not self._pieces and not self.ended:
            await self._news.wait()
            self._news.clear()
        pieces, self._pieces = self._pieces, []
        return pieces

    def hear(self, position: str, pieces: list[Piece]) -> None:
        """New pieces, up to a position of the stream."""
        self.position = position
        self._pieces += pieces
        self._news.set()

    def hear_end(self) -> None:
        """The job has ended."""
        self.ended = True
        self._news.set()


class Follower:
    """Everybody in one event loop who waits for a job. An async context manager; the producer must outlive it."""

    def __init__(self, producer: Producer) -> None:
        self._store = producer.store
        self._signals = Signals(producer.settings)
        self._streams = Streams(producer.settings, self._signals)
        self._ears: dict[UUID, list[Ear]] = {}
        self._told: set[UUID] = set()  # those with pieces that were not fetched yet
        self._any_told = asyncio.Event()
        self._stop = threading.Event()
        self._hearing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()

        def listen(kind: str, heard: object, ready: threading.Event) -> threading.Thread:
            def pass_on(job_id: UUID) -> None:
                loop.call_soon_threadsafe(heard, job_id)  # type: ignore[arg-type]

            arguments = (kind, pass_on, self._stop, ready)
            return threading.Thread(target=self._signals.listen, args=arguments, name=f"hear-{kind}", daemon=True)

        self._threads = [listen(ENDED, self._on_end, self._hearing), listen(TOLD, self._on_told, threading.Event())]
        for thread in self._threads:
            thread.start()
        self._tasks = [asyncio.create_task(self._look_for_ends()), asyncio.create_task(self._fetch())]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for thread in self._threads:
            await run_sync(thread.join)
        self._streams.close()
        self._signals.close()

    @property
    def refused_messages(self) -> int:
        """Messages heard here that none of us signed."""
        return self._signals.signer.refused

    @contextmanager
    def ear(self, job_id: UUID, *, streamed: bool = False) -> Iterator[Ear]:
        """Listen for this job. Made before it is submitted, it hears everything."""
        ear = Ear(job_id, streamed=streamed)
        self._ears.setdefault(job_id, []).append(ear)
        if streamed:
            self._on_told(job_id)
        try:
            yield ear
        finally:
            self._ears[job_id].remove(ear)
            if not self._ears[job_id]:
                del self._ears[job_id]

    # -- in the loop --------------------------------------------------------------------------------------------

    def _on_end(self, job_id: UUID) -> None:
        for ear in self._ears.get(job_id, ()):
            ear.hear_end()

    def _on_told(self, job_id: UUID) -> None:
        if job_id in self._ears:
            self._told.add(job_id)
            self._any_told.set()

    async def _look_for_ends(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_WITH_SIGNALS_SECONDS if self._hearing.is_set() else _LOOK_SECONDS)
            waiting = [job_id for job_id, ears in self._ears.items() if not all(ear.ended for ear in ears)]
            with suppress(StoreUnavailable):
                for job_id in await run_sync(self._store.ended, waiting) if waiting else ():
                    self._on_end(job_id)

    async def _fetch(self) -> None:
        """One trip to Redis for all that was told meanwhile."""
        while True:
            await self._any_told.wait()
            self._any_told.clear()
            told, self._told = self._told, set()
            ears = [ear for job_id in told for ear in self._ears.get(job_id, ()) if ear.streamed]
            found = await run_sync(self._streams.read, [(ear.job_id, ear.position) for ear in ears]) if ears else []
            for ear, (position, pieces) in zip(ears, found, strict=True):
                if pieces:
                    ear.hear(position, pieces)
