"""What is the same in every engine: intake, order, deadlines, cancelling, the split of time, the events.

An engine adds the forward pass (`_forward`), and a scheduler that says which rows take part in it.
"""

import heapq
import itertools
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from models.catalog import ModelSpec
from models.protocol import (
    FIRST_STEPS,
    Delta,
    DuplicateRequest,
    Ended,
    Event,
    Failure,
    GenerationRequest,
    GpuLoad,
    Health,
    InvalidRequest,
    Outcome,
    Started,
    check_request,
)
from models.rows import Advance, Flight
from models.scheduler import Plan, Scheduler, Work

log = logging.getLogger(__name__)

_PREPARING_SECONDS = 0.01  # an engine with nothing else to do looks this often whether a request is ready


class BaseEngine(ABC):
    """Implements `models.protocol.Engine` around a forward pass."""

    def __init__(
        self,
        spec: ModelSpec,
        scheduler: Scheduler,
        *,
        device: str,
        vocab_tokens: int,
        context_tokens: int,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._spec = spec
        self._scheduler = scheduler
        self._device = device
        self._vocab_tokens = vocab_tokens
        self._context_tokens = context_tokens
        self._decode = decode
        self._flights: dict[str, Flight] = {}  # every request that has not ended
        self._preparing: dict[Flight, Future[Any]] = {}  # those whose rows the scheduler does not know yet
        self._deadlines: list[tuple[float, int, Flight]] = []  # heap; may hold flights that have ended
        self._cancelled: list[Flight] = []  # since the last step
        self._arrivals = itertools.count()
        self._steps = 0
        self._busy_seconds = 0.0
        self._first_steps_seconds = self._later_steps_seconds = 0.0  # the longest of each
        self._step_began: float | None = None
        self._started_at = time.time()

    @abstractmethod
    def _forward(self, plan: Plan) -> list[Advance]:
        """One pass over the rows of the plan; one `Advance` for each. May raise: then all of them fail."""

    def _prepare(self, request: GenerationRequest) -> Future[Any] | None:  # noqa: ARG002  for those that override it
        """What must be done, by another thread, before the request's first step; None if nothing."""
        return None

    def _recover(self) -> None:  # noqa: B027  an engine without state has nothing to do
        """After a failed pass: drop what it left behind. Raises if no pass can ever succeed again."""

    def _failure(self, error: Exception) -> Failure:
        return Failure("engine_error", f"{type(error).__name__}: {error}", retryable=True)

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine`."""
        check_request(request, vocab_tokens=self._vocab_tokens, context_tokens=self._context_tokens)
        if request.id in self._flights:
            raise DuplicateRequest(request.id)
        flight = Flight(request, time.monotonic(), self._decode)
        self._flights[request.id] = flight
        prepared = self._prepare(request)
        if prepared is None or (prepared.done() and not prepared.exception()):
            self._enter(flight)
        else:
            self._preparing[flight] = prepared
        if request.deadline_seconds is not None:
            heapq.heappush(self._deadlines, (flight.deadline_at, next(self._arrivals), flight))

    def cancel(self, request_id: str) -> None:
        """See `Engine`."""
        if flight := self._flights.get(request_id):
            self._cancelled.append(flight)

    def has_work(self) -> bool:
        """See `Engine`."""
        return bool(self._flights)

    def step(self) -> list[Event]:
        """See `Engine`."""
        self._step_began = began = time.monotonic()
        try:
            events = self._end_stopped(began) + self._take_prepared()
            plan = self._scheduler.plan()
            if plan.works:
                events += self._run(plan, began)
            elif self._preparing:
                wait(self._preparing.values(), _PREPARING_SECONDS, FIRST_COMPLETED)
            return events
        finally:
            self._step_began = None

    def drain(self) -> list[Event]:
        """See `Engine`."""
        untouched = [flight for flight in self._flights.values() if flight.started_at is None]
        return self._end((flight, "released") for flight in untouched)

    def health(self) -> Health:
        """See `Engine`."""
        began = self._step_began
        return Health(
            model=self._spec.name,
            engine=self._spec.engine,
            quantization=self._spec.quantization,
            device=self._device,
            slots=self._spec.slots,
            context_tokens=self._context_tokens,
            running=len(self._scheduler.running),
            waiting=self._scheduler.waiting,
            steps=self._steps,
            busy_seconds=self._busy_seconds,
            step_seconds=None if began is None else time.monotonic() - began,
            first_steps_seconds=self._first_steps_seconds,
            later_steps_seconds=self._later_steps_seconds,
            started_at=self._started_at,
            pid=os.getpid(),
            gpu=self._gpu(),
        )

    def _gpu(self) -> GpuLoad | None:
        """Of the device, if it is one. Must not block, either."""
        return None

    def close(self) -> None:
        """See `Engine`."""
        self._end([(flight, "cancelled") for flight in list(self._flights.values())])
        self._deadlines = []
        self._recover()

    def _end_stopped(self, now: float) -> list[Event]:
        """End what was cancelled, and what is past its deadline."""
        stopped: dict[Flight, Outcome] = {}
        while self._deadlines and self._deadlines[0][0] <= now:
            stopped[heapq.heappop(self._deadlines)[-1]] = "expired"
        stopped |= dict.fromkeys(self._cancelled, "cancelled")
        self._cancelled = []
        return self._end((flight, outcome) for flight, outcome in stopped.items() if self._is_open(flight))

    def _enter(self, flight: Flight) -> None:
        for row in flight.rows:
            self._scheduler.add(row)

    def _take_prepared(self) -> list[Event]:
        """What is ready joins the queue; what cannot be made ready ends."""
        failed = []
        for flight, prepared in [pair for pair in self._preparing.items() if pair[1].done()]:
            if error := prepared.exception():
                flight.failure = self._unprepared(error)
                failed.append(flight)
            else:
                del self._preparing[flight]
                self._enter(flight)
        return self._end((flight, "failed") for flight in failed)

    def _unprepared(self, error: BaseException) -> Failure:
        if isinstance(error, InvalidRequest):
            return Failure("invalid_request", str(error), retryable=False)
        return Failure("engine_error", f"{type(error).__name__}: {error}", retryable=True)

    def _is_open(self, flight: Flight) -> bool:
        return self._flights.get(flight.request.id) is flight

    def _run(self, plan: Plan, began: float) -> list[Event]:
        """The pass itself: advance every row of the plan, split the time, end what is over."""
        events = self._start(plan.works, began)
        advances, deltas = self._advance(plan)
        self._split(time.monotonic() - began, advances)
        for advance in advances:
            advance.row.flight.failure = advance.row.flight.failure or advance.failure
        rows = dict.fromkeys(advance.row for advance in advances)
        self._scheduler.drop([row for row in rows if row.finish_reason])
        over = dict.fromkeys(row.flight for row in rows if row.flight.is_over)
        ended = self._end((flight, "failed" if flight.failure else "succeeded") for flight in over)
        return [*events, *deltas, *ended]

    def _advance(self, plan: Plan) -> tuple[list[Advance], list[Delta]]:
        """The forward pass and its text; if it fails, all its rows do, and the engine lives on."""
        try:
            advances = self._forward(plan)
            return advances, [delta for advance in advances for delta in self._apply(advance)]
        except Exception as error:
            log.exception("a step over %d rows failed", len(plan.works))
            failure = self._failure(error)
        self._recover()  # not in the handler: there the error's frames still hold the step's tensors
        return [Advance(work.row, work.tokens, failure=failure) for work in plan.works], []

    def _start(self, works: Sequence[Work], now: float) -> list[Event]:
        fresh = dict.fromkeys(work.row.flight for work in works if work.row.flight.started_at is None)
        for flight in fresh:
            flight.started_at = now
        return [Started(flight.request.id) for flight in fresh]

    def _apply(self, advance: Advance) -> list[Delta]:
        """Give the row its tokens and turn them into text."""
        row, flight = advance.row, advance.row.flight
        if not advance.token_ids and (row.tokens_to_come or row.missing_tokens):
            return []  # it goes on
        began = time.monotonic()
        if advance.token_ids:
            flight.first_token_at = flight.first_token_at or began
        text = row.take(advance)
        flight.detokenize_seconds += time.monotonic() - began
        return [row.delta(text)] if text and flight.request.stream else []

    def _split(self, step_seconds: float, advances: Sequence[Advance]) -> None:
        """Each request pays for its part of the tokens; all parts make up the step."""
        per_token = step_seconds / max(1, sum(advance.processed_tokens for advance in advances))
        for advance in advances:
            advance.row.flight.busy_seconds += per_token * advance.processed_tokens
        self._busy_seconds += step_seconds
        self._count_step(step_seconds)

    def _count_step(self, step_seconds: float) -> None:
        if self._steps < FIRST_STEPS:
            self._first_steps_seconds = max(self._first_steps_seconds, step_seconds)
        else:
            self._later_steps_seconds = max(self._later_steps_seconds, step_seconds)
        self._steps += 1

    def _end(self, ends: Iterable[tuple[Flight, Outcome]]) -> list[Event]:
        """Close these flights and forget their rows."""
        now = time.monotonic()
        return [self._close_flight(flight, outcome, now) for flight, outcome in ends]

    def _close_flight(self, flight: Flight, outcome: Outcome, now: float) -> Ended:
        unfinished = [row for row in flight.rows if row.finish_reason is None]
        ended = flight.end(outcome, now)
        if self._preparing.pop(flight, None) is None:
            self._scheduler.drop(unfinished)
        del self._flights[flight.request.id]
        flight.rows = []  # each refers to its flight: without this only the collector would free their tokens
        return ended
