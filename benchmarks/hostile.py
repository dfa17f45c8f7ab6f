"""What a polite tenant notices of a hostile one: p99 of chat completions without it and with it.

The hostile tenant sends a table of requests that are meant to hurt, over 16 connections without a pause. It is a
process of its own, at the lowest priority: it would be on another machine. The polite one asks one at a time, echo.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import record
from benchmarks.gateway import over_http, stack_with_gateway
from benchmarks.interactive import latencies_of
from benchmarks.record import Comparison, Promise, percentile
from headrace.stack import Stack
from jobs.database import Database
from jobs.keys import Keys

PROMISE = Promise("p99 beside a hostile tenant at most 2 times that without", at_most=2.0)

CHAT = "/v1/chat/completions"
_CONNECTIONS = 16
_BODY_BYTES = 7_900_000


def measure(*, quick: bool) -> bool:
    """Interleaved rounds; returns whether the promise held."""
    requests, rounds = (200, 2) if quick else (500, 5)
    names = [f"{side} {figure}" for side in ("hostile", "alone") for figure in ("p50", "p99")]
    figures: dict[str, list[float]] = {name: [] for name in [*names, "refusals/s", "gateway, MB"]}
    with stack_with_gateway() as stack, over_http(stack) as chat:
        for _ in range(rounds):
            _note(figures, "alone", latencies_of(chat, requests))
            with _hostile(stack, figures["refusals/s"]):
                _note(figures, "hostile", latencies_of(chat, requests))
            figures["gateway, MB"].append(_resident_bytes(stack) / 1e6)
    comparison = Comparison(figures["hostile p99"], figures["alone p99"], "ms")
    if not quick:
        parameters = {"requests": requests, "engine": "echo", "hostile_connections": _CONNECTIONS}
        record.write("hostile", parameters, figures, comparison, PROMISE)
    return record.show("a chat completion beside a hostile tenant, ms", figures, comparison, PROMISE)


def _note(figures: dict[str, list[float]], side: str, latencies: list[float]) -> None:
    figures[f"{side} p50"].append(percentile(latencies, 0.5))
    figures[f"{side} p99"].append(percentile(latencies, 0.99))


@contextmanager
def _hostile(stack: Stack, refusals: list[float]) -> Iterator[None]:
    """Another tenant, from its first pass over the table to the end of the block."""
    assert stack.record is not None
    with closing(Database(str(stack.settings.database_url), pool_size=1)) as database:
        _, secret = Keys(database).create("hostile")
    command = [sys.executable, "-m", "benchmarks.hostile", str(stack.record.gateway_url)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            print(secret, file=child.stdin, flush=True)
            assert child.stdout.readline() == "passed\n"
            yield
            child.stdin.close()
            refusals.append(float(child.stdout.readline()))
        finally:
            child.kill()


def _resident_bytes(stack: Stack) -> float:
    assert stack.record is not None
    headers = {"Authorization": f"Bearer {stack.record.gateway_key}"}
    text = httpx2.get(f"{stack.record.gateway_url}/metrics", headers=headers, trust_env=False).raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return next(sample.value for sample in samples if sample.name == "process_resident_memory_bytes")


# == the hostile tenant =========================================================================================


def chat(**fields: Any) -> bytes:
    """A body of a chat completion."""
    return json.dumps({"model": "echo", "messages": [{"role": "user", "content": "Hello"}]} | fields).encode()


def structured(schema: Any) -> bytes:
    """The same, with a schema."""
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def filled(piece: bytes) -> bytes:
    """The longest body that is accepted, full of this."""
    return b'{"model": "echo", "messages": [' + piece * (_BODY_BYTES // len(piece)) + b"1]}"


Row = tuple[str, str, dict[str, str], bytes]


def table() -> list[Row]:
    """Method, path, headers, body; each of them is to be refused."""
    bodies = [
        chat(n=10**9),
        chat(max_tokens=2**63),
        chat(messages=[{"role": "user", "content": "x" * 1_100_000}]),
        chat(messages=[{"role": "user", "content": "x" * 900_000}], n=10**9),
        chat(messages=[{"role": "user", "content": "x" * 900_000}], max_tokens=2**30),
        b'{"model": "echo", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        filled(b"[],"),
        filled(b"1,"),
        filled(b'{"a":[{"b":1}]},'),
        structured({"$ref": "#"}),
        structured({"type": "string", "pattern": "(a{1,1000}){1,1000}"}),
        structured({"allOf": [{"properties": {f"{i}.{j}": {} for j in range(60)}} for i in range(40)]}),
        chat(regex="(a{1,1000}){1,1000}", n=10**9),
    ]
    posts = [("POST", CHAT, {}, body) for body in bodies]
    bomb = ("POST", CHAT, {"Content-Encoding": "gzip"}, gzip.compress(b"0" * 10_000_000))
    paths = ["/v1/files/..%2F..%2Fetc%2Fpasswd/content", "/v1/files/file-%0d%0aSet-Cookie:x", "/v1/files?limit=x"]
    return [*posts, bomb, *(("GET", path, {}, b"") for path in paths)]


async def _endless() -> AsyncIterator[bytes]:
    """A body without a length and without an end."""
    while True:
        yield b"x" * 65_536


async def _send_all(client: httpx2.AsyncClient, rows: Sequence[Row], refused: list[int]) -> None:
    """The table, and then what is longer than anything that is accepted."""
    for method, path, headers, body in rows:
        refused.append(await _status(client.request(method, path, headers=headers, content=body)))
    with suppress(httpx2.TransportError):  # it may hang up on us
        refused.append(await _status(client.post(CHAT, content=_endless())))


async def _status(reply: Any) -> int:
    status = (await reply).status_code
    assert 400 <= status < 500, status
    return int(status)


async def _be_hostile(url: str, secret: str) -> None:
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    rows, refused = table(), list[int]()
    loop = asyncio.get_running_loop()
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=120, trust_env=False) as client:

        async def for_ever(first: int) -> None:
            while True:
                await _send_all(client, rows[first:] + rows[:first], refused)

        await _send_all(client, rows, refused)
        print("passed", flush=True)
        refused.clear()
        began = loop.time()
        sending = [asyncio.create_task(for_ever(first)) for first in range(_CONNECTIONS)]
        over = loop.run_in_executor(None, sys.stdin.read)
        await asyncio.wait({over, *sending}, return_when=asyncio.FIRST_COMPLETED)
        assert over.done(), [one.exception() for one in sending if one.done()]
        print(len(refused) / (loop.time() - began), flush=True)
        for one in sending:
            one.cancel()
        await asyncio.gather(*sending, return_exceptions=True)


if __name__ == "__main__":
    os.nice(19)
    asyncio.run(_be_hostile(sys.argv[1], sys.stdin.readline().strip()))
