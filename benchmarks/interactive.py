"""Interactive latency on an idle stack: submit to result, one at a time, against Celery doing the same durable work.

Ours: `Producer.submit` and `wait`. Theirs: a row committed at submit, `delay().get()` over a Redis result backend, the
answer committed by the task. Echo on both sides. Each side is measured while the other's worker is stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import uuid4

from benchmarks import record
from benchmarks.record import Comparison, Promise, percentile
from benchmarks.systems import PlainCelery, headrace_stack, servers
from headrace.servers import Servers
from producer.client import Producer

PROMISE = Promise("median latency at most 1.5 times plain Celery's", at_most=1.5)
_WARM_UP = 20


def measure(*, quick: bool) -> bool:
    """Interleaved rounds; returns whether the promise held."""
    requests, rounds = (100, 1) if quick else (300, 5)
    figures: dict[str, list[float]] = {
        name: [] for name in ("headrace p50", "headrace p95", "celery p50", "celery p95")
    }
    with servers() as running:
        for _ in range(rounds):
            for side, latencies in (("headrace", _headrace(running, requests)), ("celery", _celery(running, requests))):
                figures[f"{side} p50"].append(percentile(latencies, 0.5))
                figures[f"{side} p95"].append(percentile(latencies, 0.95))
    comparison = Comparison(figures["headrace p50"], figures["celery p50"], "ms")
    if not quick:
        record.write("interactive", {"requests": requests, "engine": "echo"}, figures, comparison, PROMISE)
    return record.show("interactive latency, ms", figures, comparison, PROMISE)


def _headrace(running: Servers, requests: int) -> list[float]:
    with headrace_stack(running) as settings, Producer(settings) as producer:

        def one(prompt: str) -> None:
            job = producer.submit(model="echo", messages=[{"role": "user", "content": prompt}])
            assert producer.wait(job.id, 60).text == prompt

        return latencies_of(one, requests)


def _celery(running: Servers, requests: int) -> list[float]:
    with PlainCelery(running, "threads", 72).running():
        from benchmarks.plain_celery import submit_interactive

        def one(prompt: str) -> None:
            assert submit_interactive(uuid4(), prompt) == prompt

        return latencies_of(one, requests)


def latencies_of(one: Callable[[str], None], requests: int) -> list[float]:
    """Milliseconds of each request, one after the other; those that warm up are not among them."""
    latencies = []
    for number in range(_WARM_UP + requests):
        started = time.perf_counter()
        one(f"question {number}")
        latencies.append((time.perf_counter() - started) * 1000)
    return latencies[_WARM_UP:]
