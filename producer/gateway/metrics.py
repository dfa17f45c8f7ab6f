"""`/metrics`: figures for Prometheus, of this process as they arise, of the whole system as of when they are asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import get_args

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import StoreUnavailable
from jobs.figures import BOUNDS, Distribution, Gpu
from jobs.leases import Worker
from jobs.overview import EndedJobs, Ends, OpenJobs, open_jobs
from jobs.states import Lane, State
from producer.gateway.service import MAY_ADMINISTER, Gateway, in_thread
from producer.webhook_sender import Outcome

router = APIRouter(tags=["probes"])

# However many ask, Postgres is asked no more often than this.
_LOOK_SECONDS = 1.0
# From a refusal to an answer of many pages.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
# What a client of ours that has gone was told.
_NOTHING_SAID = "499"
_KIND = ("model", "lane", "state")
_WORKER = ("worker", "model", "host")


@router.get("/metrics", dependencies=[MAY_ADMINISTER])
async def metrics(request: Request) -> Response:
    """Tell Prometheus how things are, for keys with the role admin."""
    text = await in_thread(generate_latest, request.app.state.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


class Metrics:
    """The figures of one gateway process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.request_seconds = Histogram(
            "headrace_http_request_duration_seconds",
            "From a request's headers to the last byte of its reply, a stream's too.",
            ("method", "route", "status"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.requests_in_progress = Gauge(
            "headrace_http_requests_in_progress", "Requests not yet answered to the end.", registry=self.registry
        )

    def watch(self, gateway: Gateway) -> None:
        """From now on the figures of the system are told too, and jobs that end are counted."""
        collector = SystemCollector(gateway)
        collector.collect()
        self.registry.register(collector)


@contextmanager
def served(metrics: Metrics, address: str | None) -> Iterator[None]:
    """Serve them over HTTP at `host:port`, to whoever can reach it. Raises OSError if that is taken."""
    if address is None:
        yield
        return
    host, _, port = address.rpartition(":")
    server, thread = start_http_server(int(port), host.strip("[]"), metrics.registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Metered:
    """Counts and times every request, around everything else."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _NOTHING_SAID

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        began = time.perf_counter()
        with self._metrics.requests_in_progress.track_inprogress():
            try:
                await self._app(scope, receive, noted)
            finally:
                series = self._metrics.request_seconds.labels(_method_of(scope), _route_of(scope), status)
                series.observe(time.perf_counter() - began)


def _method_of(scope: Scope) -> str:
    """One of a few: strangers must not make series."""
    return scope["method"] if scope["method"] in _METHODS else "other"


def _route_of(scope: Scope) -> str:
    """As the application has it, without ids; what the door turned away and what nobody knows has none."""
    return str(getattr(scope.get("route"), "path", "none"))


class SystemCollector(Collector):
    """What Postgres knows of jobs and workers, whoever they belong to. Thread-safe."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._database = gateway.producer.database
        self._ends = Ends(self._database)
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._found: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering it asks nobody."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Look, unless somebody just did."""
        with self._lock:
            if time.monotonic() - self._looked_at >= _LOOK_SECONDS:
                self._found = self._look()
                self._looked_at = time.monotonic()
            return [_refused(self._gateway), _webhooks(self._gateway), *self._found]

    def _look(self) -> list[Metric]:
        """Whoever asks for figures is not to wait for a Postgres that is known to be away."""
        if not self._gateway.admission.store_answers:
            return [_store_up(answers=False)]
        try:
            workers = self._gateway.producer.leases.list()
            jobs, ended = open_jobs(self._database), self._ends.look()
        except StoreUnavailable:
            return [_store_up(answers=False)]
        return [
            _store_up(answers=True),
            *_of_open_jobs(jobs, workers),
            *_of_ended_jobs(ended),
            *_of_workers(workers),
            *_of_latencies(workers),
        ]


def _store_up(*, answers: bool) -> Metric:
    return GaugeMetricFamily("headrace_store_up", "Whether Postgres answers.", value=float(answers))


def _refused(gateway: Gateway) -> Metric:
    refused = gateway.producer.refused_messages + gateway.follower.refused_messages
    about = "Messages in Redis that this gateway refused, for none of us signed them."
    return CounterMetricFamily("headrace_refused_messages", about, value=refused)


def _webhooks(gateway: Gateway) -> Metric:
    attempts = CounterMetricFamily(
        "headrace_webhook_attempts",
        "Webhooks that this gateway sent, by what came of it; a failed one is tried again.",
        labels=("outcome",),
    )
    for outcome in get_args(Outcome):
        attempts.add_metric((outcome,), gateway.webhooks.attempts[outcome])
    return attempts


def _of_open_jobs(jobs: Sequence[OpenJobs], workers: Sequence[Worker]) -> Iterator[Metric]:
    number = GaugeMetricFamily(
        "headrace_jobs", "Jobs that have not ended; the queued ones are the queue.", labels=_KIND
    )
    oldest = GaugeMetricFamily(
        "headrace_oldest_job_seconds",
        "How long the oldest interactive job has waited since it could start.",
        labels=("model",),
    )
    for kind, open_ in _with_idle(jobs, workers).items():
        number.add_metric(kind, open_.jobs)
        if kind[1:] == (Lane.INTERACTIVE, State.QUEUED):
            oldest.add_metric(kind[:1], open_.oldest_seconds)
    yield from (number, oldest)


def _with_idle(jobs: Sequence[OpenJobs], workers: Sequence[Worker]) -> dict[tuple[str, str, str], OpenJobs]:
    """By model, lane and state; a model that is served has figures also while nobody asks for it."""
    kinds = [
        (model, str(lane), str(state))
        for model in {worker.model for worker in workers}
        for lane in Lane
        for state in (State.QUEUED, State.RUNNING)
    ]
    return {kind: OpenJobs(*kind, 0, 0.0) for kind in kinds} | {(one.model, one.lane, one.state): one for one in jobs}


def _of_ended_jobs(ended: Sequence[EndedJobs]) -> Iterator[Metric]:
    number = CounterMetricFamily("headrace_jobs_ended", "Jobs that ended since this gateway started.", labels=_KIND)
    tokens = CounterMetricFamily(
        "headrace_tokens",
        "Tokens billed since this gateway started. Cached ones are among those of the prompt.",
        labels=(*_KIND, "kind"),
    )
    for one in ended:
        kind = (one.model, one.lane, one.state)
        number.add_metric(kind, one.jobs)
        tokens.add_metric((*kind, "prompt"), one.prompt_tokens)
        tokens.add_metric((*kind, "cached"), one.cached_tokens)
        tokens.add_metric((*kind, "completion"), one.completion_tokens)
    yield from (number, tokens)


def _of_workers(workers: Sequence[Worker]) -> Iterator[Metric]:
    state = GaugeMetricFamily("headrace_worker_up", "A worker whose lease runs.", labels=(*_WORKER, "state"))
    ready = GaugeMetricFamily("headrace_worker_ready", "Whether its engine answers.", labels=_WORKER)
    slots = GaugeMetricFamily("headrace_worker_slots", "Jobs that it runs together at most.", labels=_WORKER)
    running = GaugeMetricFamily("headrace_worker_running", "Jobs that it holds.", labels=_WORKER)
    busy = CounterMetricFamily("headrace_worker_busy_seconds", "Time in which its engine computed.", labels=_WORKER)
    refused = CounterMetricFamily(
        "headrace_worker_refused_messages", "Messages that it refused, for none of us signed them.", labels=_WORKER
    )
    for worker in workers:
        labels = _labels(worker)
        state.add_metric((*labels, str(worker.state)), 1)
        ready.add_metric(labels, float(worker.ready))
        slots.add_metric(labels, worker.slots)
        running.add_metric(labels, worker.running)
        busy.add_metric(labels, worker.busy_seconds)
        refused.add_metric(labels, worker.refused_messages)
    yield from (state, ready, slots, running, busy, refused)
    yield from _of_processes(workers)
    yield from _of_gpus([(_labels(worker), worker.figures.gpu) for worker in workers if worker.figures.gpu])


def _labels(worker: Worker) -> tuple[str, ...]:
    return (worker.id.hex, worker.model, worker.host)


def _of_processes(workers: Sequence[Worker]) -> Iterator[Metric]:
    labels = (*_WORKER, "process")
    cpu = CounterMetricFamily("headrace_worker_cpu_seconds", "Processor time since its process started.", labels=labels)
    memory = GaugeMetricFamily("headrace_worker_resident_bytes", "Memory that its process has.", labels=labels)
    steps = CounterMetricFamily("headrace_worker_steps", "Steps of its engine since that started.", labels=_WORKER)
    for worker in workers:
        steps.add_metric(_labels(worker), worker.figures.steps)
        for name, process in worker.figures.processes.items():
            cpu.add_metric((*_labels(worker), name), process.cpu_seconds)
            memory.add_metric((*_labels(worker), name), process.resident_bytes)
    yield from (cpu, memory, steps)


def _of_gpus(gpus: Sequence[tuple[tuple[str, ...], Gpu]]) -> Iterator[Metric]:
    """As the driver sees them: whoever uses them."""
    prefix, labels = "headrace_worker_gpu", (*_WORKER, "gpu")
    busy = GaugeMetricFamily(f"{prefix}_utilization_ratio", "Share of the time in which it computed.", labels=labels)
    used = GaugeMetricFamily(f"{prefix}_memory_used_bytes", "Memory of it that is in use.", labels=labels)
    total = GaugeMetricFamily(f"{prefix}_memory_total_bytes", "Memory that it has.", labels=labels)
    for worker, gpu in gpus:
        named = (*worker, gpu.name)
        if gpu.utilization is not None:
            busy.add_metric(named, gpu.utilization)
        used.add_metric(named, gpu.memory_used_bytes)
        total.add_metric(named, gpu.memory_total_bytes)
    yield from (busy, used, total)


def _of_latencies(workers: Sequence[Worker]) -> Iterator[Metric]:
    """Of jobs that were answered, each worker's since it started."""
    labels = (*_WORKER, "lane")
    queue = HistogramMetricFamily(
        "headrace_job_queue_seconds", "From when a job could start to its first step.", labels=labels
    )
    first = HistogramMetricFamily(
        "headrace_job_first_token_seconds", "From when a job could start to its first token.", labels=labels
    )
    whole = HistogramMetricFamily(
        "headrace_job_duration_seconds", "From when a job could start to its end.", labels=labels
    )
    for worker in workers:
        for lane, latencies in worker.figures.latencies.items():
            named = (*_labels(worker), lane)
            queue.add_metric(named, *_buckets(latencies.queue))
            first.add_metric(named, *_buckets(latencies.first_token))
            whole.add_metric(named, *_buckets(latencies.job))
    yield from (queue, first, whole)


def _buckets(one: Distribution) -> tuple[list[tuple[str, float]], float]:
    """As Prometheus counts: each bucket holds those before it."""
    bounds = [*(str(bound) for bound in BOUNDS), "+Inf"]
    return [*zip(bounds, map(float, accumulate(one.counts)), strict=True)], one.seconds
