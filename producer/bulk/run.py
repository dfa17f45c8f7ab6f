"""The plot of a bulk run: take the input in, wait for the workers, hand the output over."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypeVar
from uuid import UUID

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from jobs.batches import Batch, Progress
from jobs.errors import NotFound, StoreUnavailable
from jobs.ids import new_id
from jobs.schema import JobRequest
from jobs.states import BatchState
from producer.bulk.errors import BulkError, BulkPaused, BulkRefused
from producer.bulk.intake import Intake
from producer.bulk.options import BulkOptions
from producer.bulk.reading import LineReader
from producer.bulk.sidecar import Link, Sidecar, digest
from producer.bulk.writing import Handover
from producer.client import Producer

T = TypeVar("T")
Phase = Literal["reading", "running", "writing"]

SAMPLES = 8

_NAP_SECONDS = 0.03
# Counting the rows of a long batch takes Postgres a while: it does so for at most a fiftieth of the time.
_LOOK_MAX_SECONDS = 10.0
_LOOK_FACTOR = 50
# Postgres may be restarted or moved meanwhile; a run of hours is worth waiting for that.
_STORE_WAIT_SECONDS = 900.0
_STORE_RETRY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class BulkProgress:
    """How far a run has come, in lines and bytes."""

    total: int | None  # None while the input is read
    ended: int
    failed: int  # of those that ended, rejected ones too
    input_bytes: int
    input_offset: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class BulkReport:
    """What a run came to. Tokens, dollars and latencies are of the whole batch, `wall_seconds` of this command."""

    batch_id: UUID
    total: int
    succeeded: int
    failed: int
    rejected: int  # lines that never became a request
    prompt_tokens: int
    completion_tokens: int
    wall_seconds: float
    latency_p50_seconds: float | None
    latency_p95_seconds: float | None
    token_dollars: float
    machine_dollars: float
    samples: list[tuple[str, str]] = field(repr=False)  # a few questions and answers


class BulkRun:
    """One command's run. `open`, then `run`; `pause` from anywhere, a signal handler too."""

    def __init__(self, producer: Producer, options: BulkOptions) -> None:
        self.options = options
        self.continued = False  # whether `open` found an unfinished run to go on with
        self._producer = producer
        self._batches = producer.batches
        self._sidecar = Sidecar(options.output)
        self._pausing = False
        # Waited on instead of an Event: its `put` may be called from a signal handler while `get` is under way.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._batch: Batch
        self._link: Link
        self._models: dict[str, None] = {}  # of this run's rows, in the order they were met
        self._on_progress: Callable[[BulkProgress], None] = lambda _: None
        self._serve: Callable[[str], None] = lambda _: None
        self._phase: Phase = "reading"
        self._seen = Progress({}, 0)
        self._offset = 0
        self._next_look = 0.0

    @property
    def batch_id(self) -> UUID:
        """The batch's id, once open."""
        return self._batch.id

    def open(self) -> None:
        """Check what was asked, then make the batch or find the one to go on with.

        Raises BulkRefused, RequestInvalid naming the option at fault, StoreUnavailable, BulkPaused.
        """
        self.options.check(self._producer.validator.check)
        try:
            self._open(self._sidecar.lock())
        except BaseException as error:
            self._sidecar.release()
            if isinstance(error, _Pausing):
                raise BulkPaused("stopped before anything was begun") from None
            raise

    def run(self, on_progress: Callable[[BulkProgress], None], serve: Callable[[str], None]) -> BulkReport:
        """Run to the end, and put the output in place.

        `on_progress` is called some times a second, `serve(model)` once for each model: it has to see to a worker, but
        not to wait for it. Both are called in this thread. Raises BulkPaused, BulkError, and what those two raise; the
        same command goes on from there.
        """
        started = time.monotonic()
        self._on_progress, self._serve = on_progress, serve
        try:
            self._take_in()
            with self._handover() as handover:
                self._wait(handover)
                self._hand_over(handover)
            return self._finish(started)
        except _Pausing:
            raise self._paused() from None
        except StoreUnavailable:
            raise BulkError(_STORE_AWAY) from None
        except Exception:
            self._pause_batch()  # nobody sees to its workers any more
            raise
        finally:
            self._sidecar.release()

    def pause(self) -> None:
        """Have `run` stop soon and raise BulkPaused."""
        self._pausing = True
        self._wake.put(None)

    # -- open ---------------------------------------------------------------------------------------------------

    def _open(self, found: Link | None) -> None:
        link = found if found and not self.options.force and self._alive(found) else None
        if link is None and self.options.output.exists() and not self.options.force:
            raise BulkRefused(f"{self.options.output}: exists already; to replace it needs --force")
        sha256, size = digest(self.options.input, self._check_pause)
        wanted = Link(link.batch_id if link else new_id(), sha256, size, self.options.signature())
        if link is not None:
            self._refuse_differences(link, wanted)
        else:
            self._give_up(found)
            self._sidecar.write(wanted)
        self.continued = link is not None
        self._link = wanted
        self._batch = self._batches.open(wanted.batch_id, self._source(wanted))
        self._offset = self._batch.input_offset

    def _alive(self, link: Link) -> bool:
        """Whether its batch may still be gone on with; one that this store has never seen may be begun."""
        try:
            return self._batches.get(link.batch_id).state is not BatchState.CANCELLED
        except NotFound:
            return True

    def _refuse_differences(self, link: Link, wanted: Link) -> None:
        differences = link.differences(wanted)
        if differences:
            raise BulkRefused(
                f"{self._sidecar.path}: an unfinished run was started with other {' and '.join(differences)}; "
                "give the same again to go on with it, or --force to give it up"
            )

    def _give_up(self, link: Link | None) -> None:
        if link is not None:
            self._batches.cancel(link.batch_id)

    def _source(self, link: Link) -> dict[str, object]:
        return {
            "kind": "file",
            "input": str(self.options.input),
            "sha256": link.sha256,
            "input_bytes": link.input_bytes,
            "options": link.options,
        }

    # -- take in ------------------------------------------------------------------------------------------------

    def _take_in(self) -> None:
        """Read on from where the last committed chunk ended; workers start on what is in."""
        self._tell()
        self._need(self._steadily(lambda: self._batches.models(self.batch_id)))
        settings = self._producer.settings
        reader = LineReader(
            self.options, self._producer.validator.check, settings.max_prompt_bytes, settings.max_attempts
        )
        intake = Intake(self._batches, self._batch, reader, self._steadily)
        with self.options.input.open("rb") as file:
            for models in intake.run(file, self._link.input_bytes):
                self._offset = intake.offset
                self._need(models)
                self._check_pause()
                self._look_or_tell()
        self._check_whole()
        self._steadily(lambda: self._batches.filled(self.batch_id))
        for model in self._models:  # once more: hints may be lost
            self._producer.dispatcher.hint_bulk(model)

    def _need(self, models: Iterable[str]) -> None:
        """There are rows for these."""
        for model in dict.fromkeys(models):
            if model not in self._models:
                self._models[model] = None
                self._producer.dispatcher.hint_bulk(model)
                self._serve(model)

    def _check_whole(self) -> None:
        """A chunk that does not fit onto what was committed changes nothing: the batch was cancelled meanwhile."""
        self._batch = self._steadily(lambda: self._batches.get(self.batch_id))
        if self._batch.input_offset != self._link.input_bytes:
            raise BulkError(f"batch {self.batch_id} was cancelled, or {self.options.input} was changed meanwhile")

    # -- wait ---------------------------------------------------------------------------------------------------

    def _handover(self) -> Handover:
        options = self.options
        return Handover(self._batches, self.batch_id, self._batch.input_lines, options.output, options.errors_path)

    def _wait(self, handover: Handover) -> None:
        """Until every row has ended, writing down what has."""
        self._phase = "running"
        self._look()
        if self._seen.total == 0:
            self._give_up(self._link)
            self._sidecar.remove()
            raise BulkRefused(f"{self.options.input}: holds no request")
        while self._seen.ended < self._seen.total:
            self._nap(_NAP_SECONDS)
            self._look_or_tell()
            self._write_pages(handover)
            if handover.complete:
                self._look()

    def _write_pages(self, handover: Handover) -> None:
        while self._steadily(handover.write_page):
            self._check_pause()
            self._tell()

    def _look_or_tell(self) -> None:
        if time.monotonic() >= self._next_look:
            self._look()
        else:
            self._tell()

    def _look(self) -> None:
        self._seen, seconds = self._steadily(self._timed_progress)
        self._next_look = time.monotonic() + min(seconds * _LOOK_FACTOR, _LOOK_MAX_SECONDS)
        self._tell()

    def _timed_progress(self) -> tuple[Progress, float]:
        started = time.monotonic()
        return self._batches.progress(self.batch_id), time.monotonic() - started

    def _tell(self) -> None:
        total = None if self._phase == "reading" else self._seen.total
        seen = self._seen
        self._on_progress(
            BulkProgress(total, seen.ended, seen.failed, self._link.input_bytes, self._offset, self._phase)
        )

    # -- hand over ----------------------------------------------------------------------------------------------

    def _hand_over(self, handover: Handover) -> None:
        self._phase = "writing"
        self._tell()
        self._write_pages(handover)
        self._steadily(handover.put_in_place)

    def _finish(self, started: float) -> BulkReport:
        report = self._steadily(lambda: self._report(started))
        self._steadily(lambda: self._batches.finish(self.batch_id))
        self._sidecar.remove()
        return report

    def _report(self, started: float) -> BulkReport:
        summary = self._batches.summary(self.batch_id)
        samples = self._batches.samples(self.batch_id, SAMPLES)
        return BulkReport(
            batch_id=self.batch_id,
            total=self._seen.total,
            succeeded=summary.succeeded,
            failed=self._seen.failed - self._seen.rejected,
            rejected=self._seen.rejected,
            prompt_tokens=summary.prompt_tokens,
            completion_tokens=summary.completion_tokens,
            wall_seconds=time.monotonic() - started,
            latency_p50_seconds=summary.latency_p50_seconds,
            latency_p95_seconds=summary.latency_p95_seconds,
            token_dollars=summary.token_dollars,
            machine_dollars=summary.machine_dollars,
            samples=[(_question(request), answer) for request, answer in samples],
        )

    # -- pause, faults ------------------------------------------------------------------------------------------

    def _check_pause(self) -> None:
        if self._pausing:
            raise _Pausing

    def _paused(self) -> BulkPaused:
        self._pause_batch()
        total = "the lines" if self._phase == "reading" else f"{self._seen.total:,} lines"
        again = "without --force " if self.options.force else ""
        return BulkPaused(f"paused with {self._seen.ended:,} of {total} ended; run the same command {again}to go on")

    def _pause_batch(self) -> None:
        """What waits goes on waiting, even if nobody comes back; without Postgres that cannot be said."""
        with suppress(StoreUnavailable):
            self._batches.pause(self.batch_id)

    def _steadily(self, work: Callable[[], T]) -> T:
        """`work`, again and again while Postgres does not answer, for minutes."""
        retrying = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=0.5, max=_STORE_RETRY_SECONDS),
            stop=stop_after_delay(_STORE_WAIT_SECONDS),
            sleep=self._nap,
            before_sleep=lambda _: self._tell(),
            reraise=True,
        )
        result: T = retrying(work)
        return result

    def _nap(self, seconds: float) -> None:
        with suppress(queue.Empty):
            self._wake.get(timeout=max(seconds, 0.0))
        self._check_pause()


_STORE_AWAY = f"Postgres did not answer for {_STORE_WAIT_SECONDS:g} s; run the same command again to go on"


class _Pausing(Exception):
    """Ends `run` from inside."""


def _question(request: JobRequest) -> str:
    """What was asked last."""
    if request.messages is not None:
        return request.messages[-1].content
    return request.prompt if isinstance(request.prompt, str) else f"{len(request.prompt or ())} tokens"
