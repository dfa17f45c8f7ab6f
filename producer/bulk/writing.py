"""Hands over: OUT and ERR are written aside and renamed, so that under their names there is never half a file.

Lines are written in the order of the input as soon as all before them have ended, while others still run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self
from uuid import UUID

import orjson

from jobs.batches import Batches
from jobs.states import State
from producer.bulk.errors import BulkError
from producer.bulk.sidecar import sync_folder
from producer.openai.lines import output_line, rejected_line

_BUFFER_BYTES = 1 << 20


class Sink(Protocol):
    """Where lines go."""

    def write(self, data: bytes, /) -> object:
        """Append."""


class LineWriter:
    """Writes what became of a batch of `lines` lines: what succeeded to `good`, everything else to `bad`.

    Every method may be repeated after StoreUnavailable.
    """

    def __init__(self, batches: Batches, batch_id: UUID, lines: int, good: Sink, bad: Sink) -> None:
        self._batches = batches
        self._batch_id = batch_id
        self._lines = lines
        self._good = good
        self._bad = bad
        self._written = 0  # lines
        self._rejected = 0  # the last bad line that is written

    @property
    def complete(self) -> bool:
        """Whether every line that became a job is written."""
        return self._written >= self._lines

    def write_page(self) -> bool:
        """Write the next page of jobs; False if not all of them have ended, or none is left."""
        if self.complete:
            return False
        page = self._batches.outputs(self._batch_id, self._written)
        if page is None:
            return False
        for job in page.jobs:
            sink = self._good if job.state is State.SUCCEEDED else self._bad
            sink.write(_json(output_line(job)))
        self._written = page.last
        return True

    def write_rejected(self) -> None:
        """Write the lines that became no job."""
        while page := self._batches.rejected(self._batch_id, self._rejected):
            for rejection in page:
                self._bad.write(_json(rejected_line(self._batch_id, rejection)))
            self._rejected = page[-1].number


class Handover:
    """OUT and ERR of a batch of `lines` lines. A context manager: what is not put in place leaves no trace.

    Every method may be repeated after StoreUnavailable. They raise BulkError if the disk refuses.
    """

    def __init__(self, batches: Batches, batch_id: UUID, lines: int, output: Path, errors: Path) -> None:
        self._batches = batches
        self._batch_id = batch_id
        self._lines = lines
        self._output = output
        self._errors = errors
        self._cleanup = ExitStack()
        self._good: IO[bytes]
        self._bad: IO[bytes]
        self._writer: LineWriter

    def __enter__(self) -> Self:
        with ExitStack() as cleanup, self._disk():
            self._good, self._bad = (cleanup.enter_context(_aside(path)) for path in (self._output, self._errors))
            self._writer = LineWriter(self._batches, self._batch_id, self._lines, self._good, self._bad)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def complete(self) -> bool:
        """Whether every line that became a job is written."""
        return self._writer.complete

    def write_page(self) -> bool:
        """Write the next page of jobs; False if not all of them have ended, or none is left."""
        with self._disk():
            return self._writer.write_page()

    def put_in_place(self) -> None:
        """Add the lines that became no job, and give both files their names."""
        with self._disk():
            self._writer.write_rejected()
            _sync(self._good)
            _sync(self._bad)
            self._rename()

    def _rename(self) -> None:
        """ERR first: when OUT is there, all is."""
        if self._bad.tell():
            _part(self._errors).replace(self._errors)
        else:
            self._errors.unlink(missing_ok=True)
        sync_folder(self._errors.parent)
        _part(self._output).replace(self._output)
        sync_folder(self._output.parent)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise BulkError(
                f"{self._output}: cannot be written: {reason}. "
                "Nothing is lost: make room, then run the same command again"
            ) from error


@contextmanager
def _aside(path: Path) -> Iterator[IO[bytes]]:
    """A file beside the path, gone afterwards unless it was renamed."""
    part = _part(path)
    file = part.open("wb", _BUFFER_BYTES)
    try:
        yield file
    finally:
        part.unlink(missing_ok=True)
        _abandon(file)


def _abandon(file: IO[bytes]) -> None:
    """Close it, whether or not the disk takes what is left in its buffer: it is gone, or was synced before."""
    with suppress(OSError):
        file.close()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.headrace.part")


def _json(line: object) -> bytes:
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
