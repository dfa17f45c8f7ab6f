"""A receiver of webhooks for a test: a server on loopback that remembers what it was told."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import orjson

from kit.waiting import wait_until

# What `gateway_webhook_networks` has to name for it.
LOOPBACK = "127.0.0.0/8"
PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Told:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        """What it says, not verified."""
        event: dict[str, Any] = orjson.loads(self.body)
        return event

    def verified(self, secret: str) -> Any:
        """What it says, as the official client has it. Raises if the secret did not sign it."""
        with openai.OpenAI(api_key="none", base_url="http://127.0.0.1") as client:
            return client.webhooks.unwrap(self.body, self.headers, secret=secret)


@dataclass
class Receiver:
    """Answers 204, but first with `answers`: a status, or a status and a Location."""

    url: str
    told: list[Told] = field(default_factory=list)
    answers: list[tuple[int, str | None]] = field(default_factory=list)
    speaks: threading.Event = field(default_factory=threading.Event)  # cleared: it takes requests and says nothing

    def await_told(self, count: int) -> list[Told]:
        """Wait until it was told so often."""
        wait_until(lambda: len(self.told) >= count, PATIENCE_SECONDS, f"the receiver was told {count} times")
        return self.told


@contextmanager
def receiver(answers: Iterable[int | tuple[int, str]] = ()) -> Iterator[Receiver]:
    """One on a free port."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.receiver = Receiver(f"http://127.0.0.1:{server.server_address[1]}/hook")
    server.receiver.answers += [one if isinstance(one, tuple) else (one, None) for one in answers]
    server.receiver.speaks.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="receiver", daemon=True)
    thread.start()
    try:
        yield server.receiver
    finally:
        server.receiver.speaks.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    receiver: Receiver


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        receiver = self.server.receiver
        body = self.rfile.read(int(self.headers["content-length"]))
        receiver.told.append(Told(self.path, dict(self.headers), body))
        receiver.speaks.wait()
        status, location = receiver.answers.pop(0) if receiver.answers else (204, None)
        self.send_response(status)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""
