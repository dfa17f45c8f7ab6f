"""What the gateway adds on an idle stack: a chat completion over HTTP, against submit and wait of the Python client.

Ours: one client with one connection kept alive, the gateway a process of its own, held to its tenant by Postgres as in
every stack. Theirs: `Producer.submit` and `wait`. One at a time, echo, the same worker; the sides take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2

from benchmarks import record
from benchmarks.interactive import latencies_of
from benchmarks.record import Comparison, Promise, percentile
from headrace.stack import Stack
from jobs.settings import Settings
from producer.client import Producer

PROMISE = Promise("median chat completion at most 1.5 times the Python client's submit and wait", at_most=1.5)

Ask = Callable[[str], None]


def measure(*, quick: bool) -> bool:
    """Interleaved rounds; returns whether the promise held."""
    requests, rounds = (100, 2) if quick else (300, 10)
    figures: dict[str, list[float]] = {
        name: [] for name in ("gateway p50", "gateway p95", "producer p50", "producer p95")
    }
    with stack_with_gateway() as stack, over_http(stack) as chat, _in_process(stack.settings) as submit:
        for _ in range(rounds):
            for side, ask in (("gateway", chat), ("producer", submit)):
                latencies = latencies_of(ask, requests)
                figures[f"{side} p50"].append(percentile(latencies, 0.5))
                figures[f"{side} p95"].append(percentile(latencies, 0.95))
    comparison = Comparison(figures["gateway p50"], figures["producer p50"], "ms")
    if not quick:
        record.write("gateway", {"requests": requests, "engine": "echo"}, figures, comparison, PROMISE)
    return record.show("a chat completion over HTTP, ms", figures, comparison, PROMISE)


@contextmanager
def stack_with_gateway() -> Iterator[Stack]:
    """A stack of its own, as `headrace up` starts it."""
    with (
        tempfile.TemporaryDirectory(prefix="headrace-bench-") as home,
        Stack(Settings.load(home=home), ["echo"], with_flower=False, with_gateway=True) as stack,
    ):
        yield stack


@contextmanager
def over_http(stack: Stack) -> Iterator[Ask]:
    """A chat completion of the stack's own tenant."""
    assert stack.record is not None
    headers = {"Authorization": f"Bearer {stack.record.gateway_key}"}
    with httpx2.Client(base_url=str(stack.record.gateway_url), headers=headers, trust_env=False) as client:

        def ask(prompt: str) -> None:
            body = {"model": "echo", "messages": [{"role": "user", "content": prompt}]}
            reply = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            assert reply["choices"][0]["message"]["content"] == prompt

        yield ask


@contextmanager
def _in_process(settings: Settings) -> Iterator[Ask]:
    with Producer(settings) as producer:

        def ask(prompt: str) -> None:
            job = producer.submit(model="echo", messages=[{"role": "user", "content": prompt}])
            assert producer.wait(job.id, 60).text == prompt

        yield ask
