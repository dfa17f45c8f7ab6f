"""A job's life in a worker, top to bottom: claim, generate, finish, announce.

Two kinds of message lead here. `run_job(id)` names one interactive job. `drain(model)` says that bulk rows wait: it
claims what the engine has room for, again and again, until none are left. Both take the same path through `_begin`.
"""

from __future__ import annotations

import logging
import operator
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from uuid import UUID

import orjson
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_exponential

from jobs.errors import HeadraceError, RequestInvalid, StoreUnavailable
from jobs.schema import JobError, JobRequest, Timings, Usage
from jobs.states import AttemptOutcome
from jobs.store import SUSPECT, Claim, Settlement
from jobs.streams import Piece
from models.catalog import ModelSpec
from models.prompt import PromptError, encode_prompt
from models.protocol import Delta, Ended, Event, Failure, GenerationRequest, SamplingParams, Structure
from models.protocol import Usage as EngineUsage
from workers.answers import choices_of, logprobs_of
from workers.host import Held, Host

log = logging.getLogger(__name__)

# A drain waits for this share of the slots, or this long, before it claims again: one statement for many rows.
_REFILL_SHARE = 4
_REFILL_SECONDS = 0.01
# While the last rows run, new ones are looked for this often.
_LOOK_AGAIN_SECONDS = 1.0
_ENGINE_SECONDS = 1.0
# A row comes this much later than its message, or a message is sent again for it.
_COMMIT_SECONDS = 0.5
_NO_REASON = Failure("engine_error", "the engine gave no reason", retryable=True)


class JobFailed(HeadraceError):
    """Raised after the commit, so that Flower shows the task of a failed job as failed."""


class NotOurs(HeadraceError):
    """The message asks for nothing: the job has ended, runs elsewhere, or was given back."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How an attempt ended, once it is committed."""

    settlement: Settlement
    counted: bool  # False: the job had become somebody else's


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who wants to know. Called from the threads of the engine's reader and of the committer; must not block."""

    finished: Callable[[Finished], None]
    left_engine: Callable[[], None] = lambda: None


def run_job(host: Host, job_id: UUID) -> str:
    """One interactive job from claim to announcement. Returns its final state's name."""
    _await_engine(host)
    held = _claim(host, job_id) or _claim_when_there(host, job_id)
    if held is None:
        raise NotOurs(f"job {job_id} is not to be run here")
    done: Future[Finished] = Future()
    _begin(host, [held], Watcher(done.set_result))
    finished = done.result()
    settlement = finished.settlement
    if not finished.counted or settlement.requeues:
        raise NotOurs(f"job {job_id} was given back or taken over")
    if settlement.outcome is AttemptOutcome.FAILED and settlement.error is not None:
        raise JobFailed(f"{settlement.error.code}: {settlement.error.message}")
    return str(settlement.outcome)


def drain(host: Host) -> int:
    """Bulk rows of the route until none are left or the worker drains; at most one per worker. Returns rows run."""
    if not host.drained_by.acquire(blocking=False):
        raise NotOurs("this worker drains the route already")
    try:
        return _Drain(host).run()
    finally:
        host.drained_by.release()


class _Drain:
    """Keeps the engine full of bulk rows and never claims more than it has room for."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._in_engine = 0
        self._open = 0  # not committed yet
        self._changed = threading.Condition()
        self._awaited: Callable[[], bool] = lambda: False

    def run(self) -> int:
        rows = 0
        while True:
            _await_engine(self._host)
            room = self._await_room()
            if self._host.draining.is_set():
                break
            held = self._claim(room)
            if not held and not self._wait_for_any():
                break
            rows += len(held)
            self._start(held)
        self._wait_for_all()
        return rows

    def _claim(self, room: int) -> list[Held]:
        try:
            return _claim_bulk(self._host, room)
        except StoreUnavailable as error:
            # While rows run they are waited for, and this tries again; else a heartbeat starts the next drain.
            log.warning("nothing can be claimed: %s", error)
            return []

    def _start(self, held: Sequence[Held]) -> None:
        with self._changed:
            self._in_engine += len(held)
            self._open += len(held)
        _begin(self._host, held, Watcher(self._finished, self._left_engine))

    def _left_engine(self) -> None:
        with self._changed:
            self._in_engine -= 1
            self._wake()

    def _finished(self, _: Finished) -> None:
        with self._changed:
            self._open -= 1
            self._wake()

    def _await_room(self) -> int:
        slots = self._host.slots
        enough = max(1, slots // _REFILL_SHARE)
        with self._changed:
            self._wait(lambda: self._in_engine < slots)
            self._wait(lambda: slots - self._in_engine >= enough, _REFILL_SECONDS)
            return slots - self._in_engine

    def _wait_for_any(self) -> bool:
        """Nothing was left to claim; False when nothing runs either. What runs may still come back as a retry."""
        with self._changed:
            before = self._open
            self._wait(lambda: self._open < before, _LOOK_AGAIN_SECONDS if before else 0.0)
            return before > 0

    def _wait_for_all(self) -> None:
        with self._changed:
            self._wait(lambda: self._open == 0)

    def _wait(self, awaited: Callable[[], bool], timeout_seconds: float | None = None) -> None:
        self._awaited = awaited
        self._changed.wait_for(awaited, timeout_seconds)

    def _wake(self) -> None:
        # Only for what is awaited: a wake-up for each row of thousands a second would be most of the drain's work.
        if self._awaited():
            self._changed.notify()


# == claim =======================================================================================================


def _await_engine(host: Host) -> None:
    """While the engine starts again, nothing is claimed: a job in the queue can still go to another worker."""
    while not host.engine.ready.wait(_ENGINE_SECONDS):
        if host.draining.is_set():
            raise NotOurs("the worker stops")


def _claim(host: Host, job_id: UUID) -> Held | None:
    tokens = host.hands.reach()
    claims: list[Claim] = []
    try:
        claim = host.store.claim(job_id, host.worker_id, tokens[0])
        claims = [] if claim is None else [claim]
    finally:
        held = host.hands.take(tokens, claims)
    return held[0] if held else None


def _claim_when_there(host: Host, job_id: UUID) -> Held | None:
    """Its message goes out while its row is being committed, and may be here first."""
    return _claim(host, job_id) if _until_there(host.store.exists, job_id) else None


_until_there = Retrying(
    retry=retry_if_result(operator.not_),
    wait=wait_exponential(multiplier=_COMMIT_SECONDS / 1024, max=_COMMIT_SECONDS / 8),
    stop=stop_after_delay(_COMMIT_SECONDS),
    retry_error_callback=lambda _: False,
)


def _claim_bulk(host: Host, room: int) -> list[Held]:
    tokens = host.hands.reach(room)
    claims: list[Claim] = []
    try:
        claims = host.store.claim_bulk(host.spec.name, host.worker_id, tokens)
    finally:
        held = host.hands.take(tokens, claims)
    return held


# == generate ====================================================================================================


def _begin(host: Host, held: Sequence[Held], watcher: Watcher) -> None:
    """Hand to the engine; each one's end leads to `_ended`, its commit to `watcher.finished`."""
    suspects = [one for one in held if one.claim.suspect]
    _submit(host, [one for one in held if not one.claim.suspect], watcher)
    for one in suspects:
        _run_alone(host, one, watcher)


def _run_alone(host: Host, held: Held, watcher: Watcher) -> None:
    """Blocks until it has left the engine."""
    log.warning("job %s runs alone: an engine died under it", held.claim.id)
    over = threading.Event()

    def left_engine() -> None:
        watcher.left_engine()
        over.set()

    with host.company.alone(lambda: held.stop is not None):
        _submit(host, [held], replace(watcher, left_engine=left_engine))
        over.wait()


def _submit(host: Host, held: Sequence[Held], watcher: Watcher) -> None:
    """Tokenize and send; what cannot be prepared ends at once."""
    requests = []
    for one in held:
        started = time.perf_counter()
        then = partial(_ended, host, one, watcher)
        try:
            request = _generation_request(host, one)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job must end, and not cost the others theirs
            then(0.0, _refused(one, error))
            continue
        tokenize_seconds = time.perf_counter() - started
        requests.append((request, partial(then, tokenize_seconds)))
    if requests:
        with host.company.together():
            host.engine.submit(requests)
    # The engine ignores a stop of what it does not know yet.
    for one in held:
        if one.stop is not None:
            host.engine.cancel(one.request_id)


def _generation_request(host: Host, held: Held) -> GenerationRequest:
    claim = held.claim
    history: list[dict[str, str]] = []
    if claim.conversation is not None and claim.turn is not None:
        history = host.store.history(claim.tenant_id, claim.conversation, claim.turn)
    return GenerationRequest(
        id=held.request_id,
        prompt_token_ids=_prompt_token_ids(host, claim.request, history),
        sampling=sampling_of(claim.request, host.spec),
        deadline_seconds=claim.seconds_left,
        # What is echoed comes before the answer, with log probabilities that are known at the end alone.
        stream=claim.request.stream and not claim.request.echo,
        return_token_ids=False,
        priority=claim.priority,
        cache_salt=claim.tenant_id,
    )


def _prompt_token_ids(host: Host, request: JobRequest, history: list[dict[str, str]]) -> tuple[int, ...]:
    try:
        return tuple(encode_prompt(host.format, request.chat(history), request.prompt))
    except PromptError as error:
        raise RequestInvalid(error.field, error.message) from None


def sampling_of(request: JobRequest, spec: ModelSpec) -> SamplingParams:
    """The engine's sampling parameters for a request."""
    return SamplingParams(
        max_tokens=spec.default_max_tokens if request.max_tokens is None else request.max_tokens,
        temperature=spec.default_temperature if request.temperature is None else request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=tuple(sorted(request.logit_bias.items())),
        seed=request.seed,
        stop=request.stop,
        n=request.n,
        ignore_eos=request.ignore_eos,
        stop_token_ids=request.stop_token_ids,
        min_tokens=request.min_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=_prompt_logprobs_of(request),
        structure=structure_of(request),
    )


def _prompt_logprobs_of(request: JobRequest) -> int | None:
    """Echoed, the prompt's are told like the answer's; an answer of no tokens is only for them."""
    if request.prompt_logprobs is None and request.echo:
        return 0 if request.logprobs is None and request.max_tokens == 0 else request.logprobs
    return request.prompt_logprobs


def structure_of(request: JobRequest) -> Structure | None:
    """The form that the request asks for, in the engine's words."""
    if not request.structures:
        return None
    if request.regex is not None or request.choice is not None:
        return Structure(regex=request.regex, choice=request.choice)
    form = request.response_format
    if form is not None and form["type"] == "json_schema":
        return Structure(json_schema=orjson.dumps(form["json_schema"]["schema"]).decode())
    return Structure(json_object=True)


def _refused(held: Held, error: Exception) -> Ended:
    if isinstance(error, RequestInvalid):
        failure = Failure(error.code, str(error), retryable=False)
    elif isinstance(error, StoreUnavailable):
        failure = Failure("store_unavailable", str(error), retryable=True)
    else:
        log.error("job %s cannot be prepared", held.claim.id, exc_info=error)
        failure = Failure("worker_error", f"{type(error).__name__}: {error}", retryable=True)
    return Ended(held.request_id, "failed", error=failure)


# == finish ======================================================================================================


def _ended(host: Host, held: Held, watcher: Watcher, tokenize_seconds: float, event: Event) -> None:
    """On the engine's last word: queue the settlement. Must not block, for it runs in the engine's reader thread."""
    if isinstance(event, Delta):
        _tell(host, held, event)
    if not isinstance(event, Ended):
        return
    watcher.left_engine()
    settlement = settlement_of(host, held, event, tokenize_seconds)
    if held.stop == "fence":
        host.hands.drop([settlement.token])
        watcher.finished(Finished(settlement, counted=False))
        return
    host.committer.settle(settlement, lambda counted: watcher.finished(Finished(settlement, counted)))


def _tell(host: Host, held: Held, delta: Delta) -> None:
    """A piece of a streamed answer goes out, and is remembered for the result."""
    piece = Piece(
        attempt=str(held.claim.token),
        number=len(held.pieces),
        choice=delta.choice,
        text=delta.text,
        tokens=len(delta.token_ids),
        logprobs=logprobs_of(delta.logprobs, host.format),
    )
    held.pieces.append(piece)
    host.teller.tell(held.claim.id, piece)


def settlement_of(host: Host, held: Held, ended: Ended, tokenize_seconds: float) -> Settlement:
    """What the engine's last word means for the job: its end, or another try."""
    claim = held.claim
    outcome, error, delay = _verdict(host, held, ended)
    price = host.spec.price(_billed(ended, outcome), ended.timings.busy_seconds)
    return Settlement(
        id=claim.id,
        token=claim.token,
        outcome=outcome,
        choices=choices_of(claim.request, ended, host.format, held.pieces),
        error=error,
        usage=_usage(ended),
        timings=_timings(claim, ended, tokenize_seconds),
        served_by=host.served_by,
        token_dollars=price.token_dollars,
        machine_dollars=price.machine_dollars,
        retry_after_seconds=delay,
        metered=claim.metered,
        awaited=claim.awaited,
    )


def _verdict(host: Host, held: Held, ended: Ended) -> tuple[AttemptOutcome, JobError | None, float | None]:
    if ended.outcome == "released" or (ended.outcome == "cancelled" and held.stop != "cancel"):
        return AttemptOutcome.RELEASED, JobError(code="released", message="its worker stopped"), 0.0
    if ended.outcome == "expired":
        return AttemptOutcome.EXPIRED, JobError(code="deadline_exceeded", message="its deadline passed"), None
    if ended.outcome != "failed":
        return AttemptOutcome(ended.outcome), None, None
    return _verdict_on_failure(host, held, ended.error or _NO_REASON)


def _verdict_on_failure(
    host: Host, held: Held, failure: Failure
) -> tuple[AttemptOutcome, JobError | None, float | None]:
    error = JobError(code=failure.code, message=failure.message)
    if held.stop == "cancel":
        return AttemptOutcome.CANCELLED, error, None
    if failure.in_company:
        return AttemptOutcome.RELEASED, JobError(code=failure.code, message=SUSPECT), 0.0
    if failure.retryable and held.claim.attempt < held.claim.max_attempts:
        return AttemptOutcome.RETRIED, error, retry_delay_seconds(held.claim.attempt, host.settings.retry_max_seconds)
    return AttemptOutcome.FAILED, error, None


def retry_delay_seconds(attempt: int, longest: float) -> float:
    """Anything up to a ceiling of 1, 2, 4, ... seconds: what failed together does not return together."""
    return random.uniform(0.0, min(longest, 2.0 ** (attempt - 1)))  # noqa: S311 - no secret


def _billed(ended: Ended, outcome: AttemptOutcome) -> EngineUsage:
    """Tokens are charged when they reach the owner: not for failures and not for what runs again."""
    kept = outcome in {AttemptOutcome.SUCCEEDED, AttemptOutcome.CANCELLED, AttemptOutcome.EXPIRED}
    return ended.usage if kept else EngineUsage()


def _usage(ended: Ended) -> Usage:
    usage = ended.usage
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _timings(claim: Claim, ended: Ended, tokenize_seconds: float) -> Timings:
    timings = ended.timings
    first = timings.time_to_first_token_seconds
    return Timings(
        queue_seconds=claim.queue_seconds + timings.queue_seconds,
        tokenize_seconds=tokenize_seconds,
        prefill_seconds=timings.prefill_seconds,
        decode_seconds=timings.decode_seconds,
        detokenize_seconds=timings.detokenize_seconds,
        time_to_first_token_seconds=None if first is None else claim.queue_seconds + tokenize_seconds + first,
        busy_seconds=timings.busy_seconds,
    )
