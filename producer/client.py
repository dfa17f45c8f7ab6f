"""The one way in. Gateway, command line and bulk are thin shells over it.

    with Producer() as producer:
        job = producer.submit(model="tiny-chat", messages=[{"role": "user", "content": "What is 12 + 30?"}])
        print(producer.wait(job.id).text)

It finds the servers that the settings name, else the stack that is up on this machine. Thread-safe; make one per
process. Needs Postgres to accept; does without Redis, only slower.
"""

from __future__ import annotations

import builtins
import copy
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from jobs.api_batches import ApiBatches
from jobs.batches import Batches, Line
from jobs.conversations import Conversations
from jobs.database import Database
from jobs.dispatch import Dispatcher
from jobs.errors import IdempotencyConflict, QuotaExceeded, RequestInvalid, WaitTimeout
from jobs.files import Files
from jobs.home import connected_settings
from jobs.ids import new_id
from jobs.keys import ApiKey
from jobs.leases import Leases
from jobs.quotas import Quotas
from jobs.schema import Call, Job, JobError, JobRequest, Message
from jobs.settings import Settings
from jobs.signals import CANCEL, ENDED, Signals
from jobs.signing import Purpose, Signer
from jobs.states import State
from jobs.store import Accepted, Reservation, Store, Waiting
from jobs.tables import LOCAL_TENANT
from jobs.webhooks import Webhooks
from producer.validation import Validator

# Without a word from Redis, a waiting call looks into Postgres this often.
_LOOK_SECONDS = 0.2
_LOOK_WITH_SIGNALS_SECONDS = 1.0
# So many jobs are known to be under way. What is older is looked for.
_EXPECTED = 10_000


class Producer:
    """Submits jobs and follows them."""

    def __init__(self, settings: Settings | None = None, tenant_id: str = LOCAL_TENANT) -> None:
        self.settings = connected_settings(settings)
        assert self.settings.database_url is not None
        assert self.settings.secret is not None
        signer = Signer(self.settings.secret, Purpose.TENANTS)
        self.database = Database(self.settings.database_url, self.settings.store_wait_seconds, signer=signer)
        self.leases = Leases(self.database, self.settings.lease_seconds)
        self._validator = Validator(self.settings)
        self.dispatcher = Dispatcher(self.settings, self._note_published)
        self._signals = Signals(self.settings)
        self._ears = _Ears(self._signals)
        self._key: ApiKey | None = None
        self._shared = False  # whether another one closes what is used here
        self._serve(tenant_id)

    def _serve(self, tenant_id: str) -> None:
        self.tenant_id = tenant_id
        self.validator = self._validator.for_tenant(tenant_id)
        database = self.database.as_tenant(tenant_id)
        self.store = Store(database)
        self.batches = Batches(database, tenant_id)
        self.api_batches = ApiBatches(database)
        self.conversations = Conversations(database)
        self.files = Files(database)
        self.quotas = Quotas(database)
        self.webhooks = Webhooks(database, str(self.settings.secret))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def for_tenant(self, tenant_id: str) -> Self:
        """The same for another tenant. Cheap: it shares the connections, which are this producer's to close."""
        other = copy.copy(self)
        other._serve(tenant_id)  # noqa: SLF001 - our own kind
        other._key = None  # noqa: SLF001
        other._shared = True  # noqa: SLF001
        return other

    def for_key(self, key: ApiKey) -> Self:
        """The same for the tenant of a key, within the key's models and quota."""
        other = self.for_tenant(key.tenant_id)
        other.validator = self._validator.for_tenant(key.tenant_id, key.models)
        other._key = key  # noqa: SLF001 - our own kind
        return other

    @property
    def refused_messages(self) -> int:
        """Messages heard here that none of us signed."""
        return self._signals.signer.refused

    def close(self) -> None:
        """Let go of the servers. Jobs go on."""
        if self._shared:
            return
        self._ears.close()
        self.dispatcher.close()
        self._signals.close()
        self.database.close()

    def submit(
        self,
        request: JobRequest | None = None,
        *,
        job_id: UUID | None = None,
        endpoint: str | None = None,
        call: Call | None = None,
        after: UUID | None = None,
        **fields: Any,
    ) -> Job:
        """Accept one job: from here on it cannot be lost. The fields are those of `JobRequest`.

        `endpoint` and `call` say how it came over the API, if it did. `after`: it goes on from that job, which has not
        ended; until `release` it is blocked.

        Raises RequestInvalid naming the field at fault, IdempotencyConflict, Forbidden if the key is not for the model,
        QuotaExceeded, or StoreUnavailable; after the last one, submitting again with the same `job_id` is safe.
        """
        if request is not None and fields:
            raise TypeError("submit takes a request or its fields, not both")
        asked = request or JobRequest.parse(fields)
        checked = kept = self._check(asked)
        if after is not None:  # how long its answer may be is decided with its whole prompt
            kept = checked.model_copy(update={"max_tokens": asked.max_tokens})
        job_id = job_id or new_id()
        waiting = [Waiting(job_id, checked.model, checked.priority, self.tenant_id)]
        # The message goes out while the row is being committed: its way takes about as long. A worker that is faster
        # waits for the row; if it never comes, the message was for nothing.
        sending = self.dispatcher.begin(waiting) if self._is_sure(checked, after) else None
        accepted = self._accept_listening(job_id, checked, kept, endpoint=endpoint, call=call, after=after)
        if accepted.job is None:
            return self.get(accepted.id)
        if accepted.state is State.QUEUED:
            self.dispatcher.finish(sending or self.dispatcher.begin(waiting))
        return accepted.job

    @property
    def _quota(self) -> int | None:
        """Tokens a minute of the key, if there is one and it has one."""
        return None if self._key is None else self._key.quota_tokens_per_minute

    def _is_sure(self, checked: JobRequest, after: UUID | None) -> bool:
        """Whether nothing but a failure of Postgres can keep a request that was checked from being queued now."""
        may_be_refused = self._quota is not None
        may_be_known = checked.idempotency_key is not None
        may_be_blocked = checked.conversation is not None or after is not None
        return not (may_be_refused or may_be_known or may_be_blocked)

    def release(self, job: Job, said: Sequence[Message], asked: JobRequest) -> None:
        """Let a job that was accepted `after` another one run, with what was said up to that one's answer.

        Raises RequestInvalid if all of it together is no request that can be run.
        """
        whole = asked.model_copy(update={"messages": (*said, *(asked.messages or ()))})
        checked = self.validator.check(whole)
        waiting = self.store.release(job.id, self.tenant_id, checked, job.policy | checked.findings)
        if waiting is not None:
            self.dispatcher.publish([waiting])

    def strand(self, job_id: UUID, error: JobError) -> None:
        """End a job that was accepted `after` another one and cannot go on from it."""
        if self.store.strand(job_id, self.tenant_id, error):
            self._signals.publish(ENDED, [job_id])

    def _accept_listening(self, job_id: UUID, checked: JobRequest, kept: JobRequest, **how: Any) -> Accepted:
        """From its commit on it may end, and would be heard."""
        self._ears.expect(job_id)
        created = False
        try:
            accepted = self._accept(job_id, checked, kept, **how)
            created = accepted.created
        finally:
            if not created:
                self._ears.expect_no_more(job_id)
        return accepted

    def _accept(self, job_id: UUID, checked: JobRequest, kept: JobRequest, **how: Any) -> Accepted:
        """What is `kept` of a request that was checked; `how` it came over the API."""
        if self._key is None or self._quota is None:
            return self.store.accept(job_id, kept, self.settings.max_attempts, self.tenant_id, **how)
        tokens = within_quota(self._quota, self.validator.most_tokens(checked))
        try:
            self.quotas.reserve(self._key, tokens)
        except QuotaExceeded:
            before = self.store.accepted_before(job_id, kept, self.tenant_id)
            if before is None:
                raise
            return before
        return self._accept_reserved(job_id, kept, Reservation(self._key.id, tokens), **how)

    def _accept_reserved(self, job_id: UUID, kept: JobRequest, reservation: Reservation, **how: Any) -> Accepted:
        assert self._key is not None
        created = True  # it may be, whatever fails; if it is not, the reservation ends with its minute
        try:
            accepted = self.store.accept(job_id, kept, self.settings.max_attempts, self.tenant_id, reservation, **how)
            created = accepted.created
        except IdempotencyConflict:
            created = False
            raise
        finally:
            if not created:
                self.quotas.give_back(self._key, reservation.tokens)
        return accepted

    def _check(self, request: JobRequest) -> JobRequest:
        if self._key is not None:
            self._key.require_model(request.model)
        return self.validator.check(request)

    def _note_published(self, jobs: Sequence[Waiting]) -> None:
        for tenant_id in {job.tenant_id for job in jobs}:
            store = Store(self.database.as_tenant(tenant_id))
            store.mark_published([job.id for job in jobs if job.tenant_id == tenant_id])

    def submit_many(self, requests: Iterable[JobRequest | dict[str, Any]]) -> builtins.list[Job]:
        """Accept many jobs at once as one batch, in the bulk lane: all of them or none.

        A turn of a conversation, an idempotency key and a webhook need `submit`. Errors name the request:
        `requests[3].model`.
        """
        lines = [self._line(number, request) for number, request in enumerate(requests)]
        batch = self.batches.open(new_id(), {"kind": "submit_many", "requests": len(lines)})
        self.batches.take_in(batch, lines, (), start_offset=0, end_offset=len(lines), last_line=len(lines))
        self.batches.filled(batch.id)
        for model in sorted({line.request.model for line in lines}):
            self.dispatcher.hint_bulk(model)
        return self._all_of(batch.id, len(lines))

    def _line(self, number: int, fields: JobRequest | dict[str, Any]) -> Line:
        try:
            request = self._check(JobRequest.parse(fields))
            for alone in ("conversation", "idempotency_key", "webhook"):
                if getattr(request, alone) is not None:
                    raise RequestInvalid(alone, "is not for a batch; use submit")  # noqa: TRY301 - one place adds the index
        except RequestInvalid as error:
            raise RequestInvalid(f"requests[{number}].{error.field}", error.message, error.code) from None
        return Line(number + 1, f"request-{number}", request, request.max_attempts or self.settings.max_attempts)

    def _all_of(self, batch_id: UUID, rows: int) -> builtins.list[Job]:
        jobs = self.store.list(self.tenant_id, batch_id=batch_id, limit=rows)
        return sorted(jobs, key=lambda job: int((job.custom_id or "-0").rpartition("-")[2]))

    def get(self, job_id: UUID) -> Job:
        """The job as it is now. Raises NotFound."""
        return self.store.get(job_id, self.tenant_id)

    def list(
        self,
        *,
        states: Sequence[State] = (),
        model: str | None = None,
        batch_id: UUID | None = None,
        conversation: str | None = None,
        before: UUID | None = None,
        limit: int = 50,
    ) -> builtins.list[Job]:
        """Jobs, newest first; `before` is the last id of the page before."""
        return self.store.list(
            self.tenant_id,
            states=states,
            model=model,
            batch_id=batch_id,
            conversation=conversation,
            before=before,
            limit=limit,
        )

    def wait(self, job_id: UUID, timeout_seconds: float | None = None) -> Job:
        """The job once it has ended, however it ended. Raises WaitTimeout; the job goes on then."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._ears.hearing(job_id) as heard:
            if self._ears.expects(job_id):
                heard.wait(self._until_look(deadline))
            while not (job := self.get(job_id)).state.final:
                left = self._until_look(deadline)
                if left <= 0:
                    raise WaitTimeout(f"job {job_id} is {job.state} after {timeout_seconds:g} s")
                if heard.wait(left):
                    heard.clear()
        return job

    def _until_look(self, deadline: float | None) -> float:
        """Seconds until a waiting call looks by itself."""
        left = _LOOK_WITH_SIGNALS_SECONDS if self._ears.ready else _LOOK_SECONDS
        return left if deadline is None else min(left, deadline - time.monotonic())

    def cancel(self, job_id: UUID) -> Job:
        """End a waiting job at once; have a running one stopped. A job that has ended stays as it is."""
        state, released = self.store.cancel(job_id, self.tenant_id)
        if state is State.RUNNING:
            self._signals.publish(CANCEL, [job_id])
        elif state is State.CANCELLED:
            self._signals.publish(ENDED, [job_id])
        if released:
            self.dispatcher.publish(released)
        return self.get(job_id)


def within_quota(limit: int, tokens: int) -> int:
    """The tokens. A request that no minute has room for is no matter of waiting: raises RequestInvalid."""
    if tokens > limit:
        message = f"the request may take {tokens:,} tokens, and the key's quota is {limit:,} a minute"
        raise RequestInvalid("max_tokens", message, "tokens_above_quota")
    return tokens


class _Ears:
    """One subscriber for all waiting calls of a process, started by the first of them."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._waiting: dict[UUID, builtins.list[threading.Event]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._subscribed = _Subscribed(self._forget)
        self._expected: dict[UUID, None] = {}  # accepted since we listen and not heard of, the oldest first
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        """Whether an end would be heard."""
        return self._subscribed.is_set()

    def hearing(self, job_id: UUID) -> _Hearing:
        """A context in which the event it gives is set when the job is said to have ended."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="ears", daemon=True)
                self._thread.start()
        return _Hearing(self._waiting, self._lock, job_id)

    def _listen(self) -> None:
        self._signals.listen(ENDED, self._wake, self._stop, self._subscribed)

    def expect(self, job_id: UUID) -> None:
        """This job has not ended yet."""
        with self._lock:
            if self.ready:
                self._expected[job_id] = None
            if len(self._expected) > _EXPECTED:
                del self._expected[next(iter(self._expected))]

    def expect_no_more(self, job_id: UUID) -> None:
        """Nothing is known of this job."""
        with self._lock:
            self._expected.pop(job_id, None)

    def expects(self, job_id: UUID) -> bool:
        """Whether its end would have been heard, and was not: there is nothing to look for yet."""
        with self._lock:
            return job_id in self._expected

    def _forget(self) -> None:
        """What happened while nobody listened is not known."""
        with self._lock:
            self._expected.clear()

    def _wake(self, job_id: UUID) -> None:
        with self._lock:
            self._expected.pop(job_id, None)
            for event in self._waiting.get(job_id, ()):
                event.set()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


class _Subscribed(threading.Event):
    """Set while the subscription stands. Tells of each change, before a new one counts."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        super().__init__()
        self._on_change = on_change

    def set(self) -> None:
        self._on_change()
        super().set()

    def clear(self) -> None:
        super().clear()
        self._on_change()


class _Hearing:
    """One waiting call's place in the list."""

    def __init__(self, waiting: dict[UUID, builtins.list[threading.Event]], lock: threading.Lock, job_id: UUID) -> None:
        self._waiting = waiting
        self._lock = lock
        self._job_id = job_id
        self._event = threading.Event()

    def __enter__(self) -> threading.Event:
        with self._lock:
            self._waiting.setdefault(self._job_id, []).append(self._event)
        return self._event

    def __exit__(self, *_: object) -> None:
        with self._lock:
            events = self._waiting[self._job_id]
            events.remove(self._event)
            if not events:
                del self._waiting[self._job_id]
