"""What one worker process holds: its lease, its engine, its committer, and the jobs in its hands."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal
from uuid import UUID, uuid4

import orjson

from jobs.database import Database
from jobs.dispatch import Dispatcher
from jobs.errors import Fenced, StoreUnavailable
from jobs.figures import Figures, Gpu, Latencies
from jobs.leases import Leases, Load, Renewal
from jobs.retention import Retention
from jobs.settings import Settings
from jobs.signals import CANCEL, ENDED, Signals
from jobs.signing import MessageSigner
from jobs.states import AttemptOutcome, Lane, State
from jobs.store import Claim, Settled, Settlement, Store, Waiting
from jobs.streams import Piece, Streams
from models.catalog import ModelSpec
from models.prompt import load_prompt_format
from models.protocol import Health
from workers.committer import Committer
from workers.company import Company
from workers.engine_link import EngineLink
from workers.health import HealthFolder
from workers.loops import Loop
from workers.meter import Meter
from workers.sweeper import Sweeper
from workers.telling import PieceTeller
from workers.watchdog import Watchdog

log = logging.getLogger(__name__)

# A lease is taken for over this part of it before its end, so that a slow stop does not overrun it.
_LEASE_MARGIN = 0.1
# How often what is older than `[retention_days]` is deleted; it takes a walk through the jobs.
_RETENTION_SECONDS = 900.0
# An engine whose step lasts longer is not counted on; when it is killed, `workers.watchdog` says.
_LONG_STEP_SECONDS = 5.0

Stop = Literal["cancel", "release", "fence"]


@dataclass(slots=True)
class Held:
    """One claimed job. `stop` says why it is stopped early: asked by its owner, for a drain, or its lease ends."""

    claim: Claim
    stop: Stop | None = None
    pieces: list[Piece] = field(default_factory=list)  # told so far, if it is streamed

    @property
    def request_id(self) -> str:
        """Its name in the engine: unique per attempt, and the job can be read off it."""
        return f"{self.claim.id}/{self.claim.token}"


@dataclass(slots=True)
class Hands:
    """The tokens this worker holds or may hold, and what it knows of each. Thread-safe."""

    _held: dict[UUID, Held | None] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def reach(self, count: int = 1) -> list[UUID]:
        """Fresh tokens, held from before the claim, so that no claim is ever taken for unheld."""
        tokens = [uuid4() for _ in range(count)]
        with self._changed:
            self._held.update(dict.fromkeys(tokens))
        return tokens

    def take(self, tokens: Sequence[UUID], claims: Sequence[Claim]) -> list[Held]:
        """Keep the tokens that claimed something, drop the others."""
        held = [Held(claim) for claim in claims]
        with self._changed:
            for token in tokens:
                self._held.pop(token, None)
            self._held.update({one.claim.token: one for one in held})
            self._changed.notify_all()
        return held

    def drop(self, tokens: Sequence[UUID]) -> list[Held]:
        """These are settled; returns what was known of them."""
        with self._changed:
            dropped = [self._held.pop(token, None) for token in tokens]
            self._changed.notify_all()
        return [one for one in dropped if one is not None]

    def tokens(self) -> list[UUID]:
        """Everything held or reached for."""
        with self._changed:
            return list(self._held)

    def all(self) -> list[Held]:
        """Every claimed job."""
        with self._changed:
            return [one for one in self._held.values() if one is not None]

    def mark(self, which: Sequence[Held], stop: Stop) -> list[Held]:
        """Say why these are being stopped, the first reason stands; returns those that had none."""
        with self._changed:
            fresh = [one for one in which if one.stop is None]
            for one in fresh:
                one.stop = stop
        return fresh

    def wait_empty(self, timeout_seconds: float) -> bool:
        """Wait until nothing is held or reached for; False if that takes too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._held, timeout_seconds)


class Host:
    """Everything that a job's life needs, and the loops that keep it true."""

    def __init__(
        self, settings: Settings, spec: ModelSpec, socket_path: Path, health: HealthFolder | None = None
    ) -> None:
        assert settings.database_url is not None
        self.settings = settings
        self.spec = spec
        self.worker_id = uuid4()
        self.hands = Hands()
        self.draining = threading.Event()
        self.drained_by = threading.Lock()  # held by the one bulk drain that runs
        self.engine = engine = EngineLink(socket_path, Watchdog(settings.engine_hang_seconds))
        self.company = Company(lambda: engine.open_requests)
        self.format = load_prompt_format(spec)
        self._health = health
        self._incarnation = socket_path.with_name("worker")
        self._engine_moves = False
        self._meter = Meter()
        self._latencies = {str(lane): Latencies() for lane in Lane}
        url, patience_seconds = settings.database_url, settings.store_wait_seconds
        self._database = Database(url, patience_seconds, pool_size=8, answer_seconds=patience_seconds)
        # Heartbeats and sweeps have connections and patience of their own: no burst of claims may delay them; one
        # heartbeat that gets no answer must leave time for another before the lease ends; and if we freeze in the
        # middle of either, the locks that others need in order to take over from us must not be held for long.
        beat_seconds, third_seconds = settings.heartbeat_seconds, settings.lease_seconds / 3
        own = partial(Database, url, beat_seconds, pool_size=1, idle_seconds=third_seconds)
        self._pulse = own(answer_seconds=third_seconds)
        self._sweeping = own(answer_seconds=patience_seconds)
        self.store = Store(self._database)
        self._leases = Leases(self._pulse, settings.lease_seconds)
        self._lease_ends = 0.0
        self._busy_before = 0.0  # the engine's seconds when this incarnation began
        self.dispatcher = Dispatcher(settings, lambda jobs: self.store.mark_published([job.id for job in jobs]))
        self._signals = Signals(settings)
        self.committer = Committer(self.store, self._announce)
        self._streams = Streams(settings, self._signals)
        self.teller = PieceTeller(self._streams)
        sweeper = Sweeper(Store(self._sweeping), self.dispatcher, self._signals)
        self._loops = [
            Loop("heartbeat", settings.heartbeat_seconds, self.beat),
            Loop("lease-guard", settings.heartbeat_seconds / 5, self.guard_lease),
            Loop("sweeper", settings.sweep_seconds, sweeper.run_once),
        ]
        if settings.retention_days:
            self._loops.append(Loop("retention", _RETENTION_SECONDS, self._keep_no_longer))
        self._stop = threading.Event()
        self._closing = threading.Lock()
        self._listener = threading.Thread(target=self._listen, name="cancel-listener", daemon=True)
        # Set by whoever can start a drain: bulk rows were seen at a heartbeat, message or not.
        self.on_backlog: Callable[[], None] = lambda: None
        # Set by whoever can tell whether messages arrive.
        self.consumes: Callable[[], bool] = lambda: True
        self.slots = spec.slots
        self.served_by = spec.name

    # -- life ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Wait for the engine, take a lease, start the loops."""
        health = self.engine.open(self.settings.engine_start_seconds)
        self.slots = health.slots
        self.served_by = f"{health.model} on {health.engine}, {health.quantization}, {health.device}"
        self._bury_former()
        self._register()
        self.committer.start()
        self.teller.start()
        self._listener.start()
        for loop in self._loops:
            loop.start()

    def start_draining(self) -> None:
        """Claim no more; finish what runs for `drain_seconds`, then give it back uncharged."""
        if self.draining.is_set():
            return
        self.draining.set()
        try:
            self._leases.drain(self.worker_id)
        except StoreUnavailable as error:
            log.warning("could not announce the drain: %s", error)
        self.engine.drain()
        timer = threading.Timer(self.settings.drain_seconds, lambda: self.stop_held(self.hands.all(), "release"))
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Let what runs end, commit it, say goodbye. What is still held is taken over by another worker at once.

        May be called from several threads; each returns when it is done.
        """
        with self._closing:
            if not self._stop.is_set():
                self._close()

    def _close(self) -> None:
        self.start_draining()
        # The supervisor grants the drain and a lease; the rest of that is for the goodbye.
        self.hands.wait_empty(self.settings.drain_seconds + self.settings.lease_seconds / 2)
        self._stop.set()
        for loop in self._loops:
            loop.stop()
        self.committer.close()
        self.teller.close()
        last_load = self._load()
        self.engine.close()
        self._say_goodbye(last_load)
        self._listener.join()
        self.dispatcher.close()
        self._signals.close()
        self._database.close()
        self._pulse.close()
        self._sweeping.close()

    def _say_goodbye(self, load: Load) -> None:
        try:
            self._leases.renew(self.worker_id, load, self.hands.tokens())
            self._leases.stop(self.worker_id)
        except (Fenced, StoreUnavailable) as error:
            log.warning("could not say goodbye: %s", error)

    def _register(self) -> None:
        self._leave_name()
        info = orjson.dumps({"served_by": self.served_by, "tier": self.spec.tier}).decode()
        asked_at = time.monotonic()
        self._leases.register(
            self.worker_id,
            model=self.spec.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            slots=self.slots,
            info=info,
        )
        self._lease_ends = asked_at + self.settings.lease_seconds
        self._busy_before = self.engine.busy_seconds

    def _bury_former(self) -> None:
        """A supervisor starts a consumer when the one before has ended: nobody need wait for the end of its lease."""
        if self._incarnation.exists():
            try:
                self._leases.bury(UUID(self._incarnation.read_text()))
            except StoreUnavailable as error:
                log.warning("the lease of the consumer before has to run out: %s", error)

    def _leave_name(self) -> None:
        """For the consumer after this one."""
        fresh = self._incarnation.with_suffix(".new")
        fresh.write_text(str(self.worker_id))
        fresh.replace(self._incarnation)

    # -- heartbeat ----------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Renew the lease, stop what was cancelled, look for bulk rows; be born again if the lease was lost."""
        if self._health is not None:
            self._health.alive("consumer")
        load = self._load()
        asked_at = time.monotonic()
        try:
            renewal = self._leases.renew(self.worker_id, load, self.hands.tokens())
        except Fenced:
            self._start_anew()
            return
        self._lease_ends = asked_at + self.settings.lease_seconds
        self._obey(renewal)

    @property
    def can_take(self) -> bool:
        """Whether a message is in good hands here: the lease runs, and the engine is there."""
        return time.monotonic() < self._lease_ends and self.engine.ready.is_set()

    def guard_lease(self) -> None:
        """Stop our own rows before the lease ends if it could not be renewed: they will be somebody else's."""
        if not self._lease_is_safe:
            self.stop_held(self.hands.all(), "fence")
        if self._health is not None:
            self._health.ready = self.ready

    @property
    def ready(self) -> bool:
        """Whether it takes jobs: it holds a lease, its engine works, messages arrive, and it does not drain."""
        engine_works = self._engine_moves and self.engine.ready.is_set()
        return engine_works and self._lease_is_safe and self.consumes() and not self.draining.is_set()

    @property
    def _lease_is_safe(self) -> bool:
        return time.monotonic() <= self._lease_ends - _LEASE_MARGIN * self.settings.lease_seconds

    def _load(self) -> Load:
        health = self.engine.health()
        if health is not None and self._health is not None:
            self._health.alive("engine")
        self._engine_moves = health is not None and (health.step_seconds or 0.0) < _LONG_STEP_SECONDS
        ready = self._engine_moves and self.consumes()
        busy_seconds = self.engine.busy_seconds - self._busy_before
        return Load(len(self.hands.all()), ready, busy_seconds, self.signer.refused, self._figures(health))

    def _figures(self, health: Health | None) -> Figures | None:
        """What is known while the engine answers."""
        if health is None:
            return None
        processes = self._meter.look({"consumer": os.getpid(), "engine": health.pid})
        gpu = None if health.gpu is None else Gpu(**asdict(health.gpu))
        return Figures(processes, gpu, health.steps, self._latencies)

    @property
    def signer(self) -> MessageSigner:
        """Who knows our messages, and counts those that are none."""
        return self._signals.signer

    def _obey(self, renewal: Renewal) -> None:
        cancelled = set(renewal.cancelled)
        self.stop_held([one for one in self.hands.all() if one.claim.token in cancelled], "cancel")
        if renewal.backlog:
            self.on_backlog()

    def _start_anew(self) -> None:
        log.warning("worker %s was taken for dead; it goes on as a new one", self.worker_id)
        self.stop_held(self.hands.all(), "fence")
        self.worker_id = uuid4()
        if not self.draining.is_set():
            self._register()

    # -- stopping jobs ------------------------------------------------------------------------------------------

    def stop_held(self, which: Sequence[Held], why: Stop) -> None:
        """Have the engine end these within a step."""
        fresh = self.hands.mark(which, why)
        for one in fresh:
            self.engine.cancel(one.request_id)
        if fresh:
            log.info("stopping %d jobs: %s", len(fresh), why)

    def cancel(self, job_id: UUID) -> None:
        """Cancel a job as its owner would, whoever that is and whoever holds it."""
        state, released = self.store.cancel(job_id, self.store.tenant_of(job_id))
        self._signals.publish(CANCEL if state is State.RUNNING else ENDED, [job_id])
        if released:
            self.dispatcher.publish(released)

    def _listen(self) -> None:
        self._signals.listen(CANCEL, self._cancel, self._stop, threading.Event())

    def _cancel(self, job_id: UUID) -> None:
        self.stop_held([one for one in self.hands.all() if one.claim.id == job_id], "cancel")

    def _keep_no_longer(self) -> None:
        purged = Retention(self._database, self._streams.forget).keep_for(self.settings.retention_days)
        if purged.jobs or purged.batches or purged.conversations:
            log.info("purged %s", purged)

    # -- after the commit ---------------------------------------------------------------------------------------

    def _announce(self, settlements: Sequence[Settlement], settled: Settled) -> None:
        """In the committer's thread: what was settled leaves our hands; then whoever waits is told."""
        dropped = self.hands.drop([settlement.token for settlement in settlements])
        self._note_latencies(settlements, settled, dropped)
        interactive = {one.claim.id: one.claim for one in dropped if one.claim.lane is Lane.INTERACTIVE}
        done = [s for s in settlements if s.id in settled.done and s.id in interactive]
        self._signals.publish(ENDED, [s.id for s in done if not s.requeues])
        # What is given back need not wait until a sweeper misses its message.
        released = [interactive[s.id] for s in done if s.outcome is AttemptOutcome.RELEASED]
        messages = [*settled.released, *(Waiting(c.id, c.model, c.priority, c.tenant_id) for c in released)]
        if messages:
            self.dispatcher.publish(messages)

    def _note_latencies(self, settlements: Sequence[Settlement], settled: Settled, dropped: Sequence[Held]) -> None:
        lanes = {one.claim.token: one.claim.lane for one in dropped}
        for settlement in settlements:
            answered = settlement.outcome is AttemptOutcome.SUCCEEDED and settlement.id in settled.done
            if answered and settlement.token in lanes:
                latencies, timings = self._latencies[lanes[settlement.token]], settlement.timings
                latencies.queue.note(timings.queue_seconds)
                latencies.job.note(timings.total_seconds)
                if timings.time_to_first_token_seconds is not None:
                    latencies.first_token.note(timings.time_to_first_token_seconds)
