"""Runs the batches of the API: threads of the gateways, each of which takes whatever batch has something to be done.

A batch is seen to in steps: look at its file, take it in, wait, write its output. Between steps nobody holds it, so a
gateway may go at any time, and another goes on.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO, TypeVar
from uuid import UUID, uuid4

from jobs.api_batches import LEASE_SECONDS, LIFE_SECONDS, ApiBatch, Counts, Fault
from jobs.batches import Batch, Line, Progress
from jobs.errors import Fenced, ModelUnknown, NotFound, StoreUnavailable
from jobs.files import FileReader, FileWriter
from jobs.ids import new_id
from jobs.schema import JobRequest
from jobs.states import ApiBatchState, BatchState, State
from jobs.store import Reservation
from producer.batch_files import FileCheck
from producer.bulk.intake import Intake
from producer.bulk.reading import AsTheyAre, LineReader, max_line_bytes
from producer.bulk.writing import LineWriter
from producer.client import Producer, within_quota

log = logging.getLogger(__name__)

T = TypeVar("T")

OUTPUT_SECONDS = 30 * 86_400
OUTPUT_PURPOSE = "batch_output"
_THREADS = 2
_IDLE_SECONDS = 0.5
_RENEW_SECONDS = LEASE_SECONDS / 4
# A batch is looked at again after a tenth of the time it has taken so far.
_LOOK_MIN_SECONDS = 0.2
_LOOK_MAX_SECONDS = 10.0
_LOOK_SHARE = 10
# So long after its time is over it is the runner that ends what waits: workers do it sooner, if there are any.
_OVERDUE_SECONDS = 5.0
# The deadline of a line that comes in when the batch's time is over: nobody runs it.
_OVER_SECONDS = 0.001
_TIDY_SECONDS = 60.0
_BUFFER_BYTES = 1 << 20


class BatchRunner:
    """The threads of one process. `may_run` refuses models that no line may ask for."""

    def __init__(self, producer: Producer, may_run: Callable[[str], bool], threads: int = _THREADS) -> None:
        self._producer = producer
        self._may_run = may_run
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._tidied_at = 0.0
        self._threads = [
            threading.Thread(target=self._run, name=f"batches-{number}", daemon=True) for number in range(threads)
        ]

    def start(self) -> None:
        """Begin to see to batches."""
        for thread in self._threads:
            thread.start()

    def hurry(self) -> None:
        """There is a new one."""
        self._hurry.set()

    def close(self) -> None:
        """Let the steps under way end at their next chunk; other runners go on."""
        self._stop.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join()

    def run_once(self, runner: UUID) -> bool:
        """One step of one batch; False if none has anything to be done. Raises StoreUnavailable."""
        taken = self._producer.api_batches.take(runner)
        if taken is None:
            return False
        batch_id, tenant_id = taken
        producer = self._producer.for_tenant(tenant_id)
        step = _Step(producer, producer.api_batches.get(batch_id, tenant_id), runner, self._may_run, self._stop)
        try:
            step.run()
        except Fenced as error:
            log.info("%s", error)
        return True

    def _run(self) -> None:
        runner = uuid4()
        while not self._stop.is_set():
            if not self._tried(runner):
                self._hurry.wait(_IDLE_SECONDS)
                self._hurry.clear()

    def _tried(self, runner: UUID) -> bool:
        try:
            self._tidy()
            return self.run_once(runner)
        except StoreUnavailable as error:
            log.warning("batches wait: %s", error)
        except Exception:  # its lease ends, and another try is made; the other batches must not wait for it
            log.exception("a step of a batch failed")
        return False

    def _tidy(self) -> None:
        if time.monotonic() - self._tidied_at > _TIDY_SECONDS:
            self._tidied_at = time.monotonic()
            while self._producer.files.tidy() and not self._stop.is_set():
                pass


class _Step:
    """One batch in a runner's hands, for one step. Every look at the store may raise StoreUnavailable: try again."""

    def __init__(
        self,
        producer: Producer,
        batch: ApiBatch,
        runner: UUID,
        may_run: Callable[[str], bool],
        stop: threading.Event,
    ) -> None:
        self._producer = producer
        self._batch = batch
        self._runner = runner
        self._may_run = may_run
        self._stop = stop
        self._all = producer.api_batches
        self._files = producer.files
        self._renewed_at = time.monotonic()
        self._limit: int | None = None  # of its key, in tokens a minute

    def run(self) -> None:
        if self._batch.state is ApiBatchState.VALIDATING:
            self._validate()
        if self._batch.state is ApiBatchState.IN_PROGRESS and not self._take_in():
            self._all.rest(self._batch.id, self._runner, _LOOK_MAX_SECONDS)
            return
        if self._batch.state is ApiBatchState.CANCELLING:
            self._cancel()
        if not self._batch.state.final:
            self._look()

    # -- validating ---------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        try:
            file, size = self._input()
        except NotFound:
            fault = Fault("invalid_input_file", "The input file was deleted.", param="input_file_id")
            self._batch = self._all.failed(self._batch.id, self._runner, [fault])
            return
        check = FileCheck(self._batch.endpoint, self._max_line_bytes)
        with file:
            check.run(file, size, self._go_on)
        if check.faults:
            self._batch = self._all.failed(self._batch.id, self._runner, check.faults)
        else:
            self._batch = self._all.started(self._batch.id, self._runner, check.requests)

    def _input(self) -> tuple[IO[bytes], int]:
        """The input, also of one that was deleted while the batch runs. Raises NotFound."""
        size = self._files.size(self._batch.input_file_id, self._batch.tenant_id)
        reader = FileReader(self._files, self._batch.input_file_id, size)
        return io.BufferedReader(reader, _BUFFER_BYTES), size

    @property
    def _max_line_bytes(self) -> int:
        return max_line_bytes(self._producer.settings.max_prompt_bytes)

    # -- in progress --------------------------------------------------------------------------------------------

    def _take_in(self) -> bool:
        """What of the input is not in yet. False: some of it has to wait for its key's next minute."""
        file, size = self._input()
        with file:
            batch = self._batch_of(size)
            if batch.state is not BatchState.FILLING:
                return True
            settings = self._producer.settings
            self._limit = self._quota()
            reader = LineReader(AsTheyAre(), self._checked, settings.max_prompt_bytes, settings.max_attempts)
            intake = Intake(self._producer.batches, batch, reader, lambda work: work(), self._admitted)
            for models in intake.run(file, size):
                self._hint(models)
                self._go_on()
                if self._batch.state is ApiBatchState.CANCELLING:
                    return True
        if intake.offset < size:
            return False
        self._producer.batches.filled(self._batch.id)
        return True

    def _quota(self) -> int | None:
        """Tokens a minute. What comes in when the batch's time is over does not run, and needs none."""
        if self._batch.key_id is None or self._batch.seconds_left <= 0:
            return None
        return self._producer.quotas.limit(self._batch.key_id, self._batch.tenant_id)

    def _admitted(self, lines: Sequence[Line]) -> Sequence[Line]:
        """Those that the key's minute has room for."""
        if self._limit is None or self._batch.key_id is None:
            return lines
        key_id = self._batch.key_id
        amounts = [self._producer.validator.most_tokens(line.request) for line in lines]
        count = self._producer.quotas.reserve_first(key_id, self._batch.tenant_id, amounts)
        reserved = zip(lines[:count], amounts[:count], strict=True)
        return [replace(line, reservation=Reservation(key_id, tokens)) for line, tokens in reserved]

    def _batch_of(self, size: int) -> Batch:
        """The rows' batch, which is made or gone on with unless its whole input is in."""
        try:
            batch = self._producer.batches.get(self._batch.id)
        except NotFound:
            batch = None
        if batch is not None and batch.input_offset == size and batch.state is not BatchState.FILLING:
            return batch
        source = {"kind": "api", "input_file_id": str(self._batch.input_file_id)}
        return self._producer.batches.open(self._batch.id, source)

    def _checked(self, request: JobRequest) -> JobRequest:
        """A line against its model; it ends with the batch's time. Raises RequestInvalid."""
        allowed = self._batch.models
        if not self._may_run(request.model) or (allowed is not None and request.model not in allowed):
            raise ModelUnknown(f"The model {request.model!r} does not exist.")
        timed = request.model_copy(update={"deadline_seconds": max(_OVER_SECONDS, self._batch.seconds_left)})
        checked = self._producer.validator.check(timed)
        if self._limit is not None:
            within_quota(self._limit, self._producer.validator.most_tokens(checked))
        return checked

    def _hint(self, models: list[str]) -> None:
        for model in models:
            self._producer.dispatcher.hint_bulk(model)

    # -- cancelling ---------------------------------------------------------------------------------------------

    def _cancel(self) -> None:
        self._producer.batches.cancel(self._batch.id)

    # -- waiting ------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        progress = self._producer.batches.progress(self._batch.id)
        if progress.ended == progress.total:
            self._batch = self._all.finalizing(self._batch.id, self._runner)
            self._finalize(progress)
            return
        if self._batch.seconds_left < -_OVERDUE_SECONDS:
            self._producer.batches.expire(self._batch.id)
        lasted_seconds = LIFE_SECONDS - self._batch.seconds_left
        seconds = min(_LOOK_MAX_SECONDS, max(_LOOK_MIN_SECONDS, lasted_seconds / _LOOK_SHARE))
        self._all.rest(self._batch.id, self._runner, seconds)

    # -- finalizing ---------------------------------------------------------------------------------------------

    def _finalize(self, progress: Progress) -> None:
        good, bad = self._writer("output"), self._writer("error")
        lines = self._input_lines()
        writer = LineWriter(self._producer.batches, self._batch.id, lines, good, bad)
        while writer.write_page():
            self._go_on()
        writer.write_rejected()
        expired = self._batch.seconds_left <= 0 and State.EXPIRED in progress.states
        self._batch = self._all.ended(
            self._batch.id,
            self._runner,
            expired=expired,
            counts=self._counts(progress),
            output_file_id=self._handed_over(good),
            error_file_id=self._handed_over(bad),
        )
        self._producer.batches.finish(self._batch.id)

    def _input_lines(self) -> int:
        try:
            return self._producer.batches.get(self._batch.id).input_lines
        except NotFound:  # cancelled before anything was taken in
            return 0

    def _writer(self, name: str) -> FileWriter:
        file_id = new_id()
        filename = f"batch_{self._batch.id.hex}_{name}.jsonl"
        seconds = self._batch.output_seconds or OUTPUT_SECONDS
        self._files.begin(file_id, self._batch.tenant_id, OUTPUT_PURPOSE, filename, seconds)
        return FileWriter(self._files, file_id, self._batch.tenant_id)

    def _handed_over(self, writer: FileWriter) -> UUID | None:
        """Its id; none if nothing is in it."""
        if writer.size == 0:
            self._files.give_up(writer.file_id)
            return None
        return writer.finish().id

    def _counts(self, progress: Progress) -> Counts:
        summary = self._producer.batches.summary(self._batch.id)
        return Counts(
            total=max(progress.total, self._batch.counts.total),
            completed=summary.succeeded,
            failed=progress.failed,
            prompt_tokens=summary.prompt_tokens,
            cached_tokens=summary.cached_tokens,
            completion_tokens=summary.completion_tokens,
        )

    # -- the lease ----------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Between two chunks. Raises Fenced when the batch is somebody else's, or is to be let go."""
        if self._stop.is_set():
            self._all.rest(self._batch.id, self._runner, 0.0)
            raise Fenced(f"batch {self._batch.id} is left to others")
        if time.monotonic() - self._renewed_at > _RENEW_SECONDS:
            self._batch = self._all.renew(self._batch.id, self._runner)
            self._renewed_at = time.monotonic()
