"""Serves the gateway over HTTP, until a signal."""

from __future__ import annotations

from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jobs.settings import Settings
from producer.client import Producer
from producer.gateway.app import create_app

LOOPBACK = "127.0.0.1"

# Clients keep connections open between requests; one that closes under a request costs it a try.
_KEEP_ALIVE_SECONDS = 75
# Streams that are open when the process is to end are cut then; their jobs are cancelled, those in the background not.
_GRACE_SECONDS = 5
# More than any client sends, and what other servers accept.
HEAD_BYTES = 64 * 1024


def serve(settings: Settings, port: int, address: str = LOOPBACK) -> None:
    """Be the gateway, in this thread."""
    with Producer(settings) as producer:
        server_of(producer, port, address).run()


def server_of(producer: Producer, port: int, address: str = LOOPBACK) -> uvicorn.Server:
    """A server of the gateway on this producer; `run` serves."""
    config = uvicorn.Config(
        create_app(producer),
        host=address,
        port=port,
        http=_Protocol,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    return uvicorn.Server(config)


class _Protocol(HttpToolsProtocol):
    """Refuses a head or trailers without an end: the parser would keep all of it, before the door sees anything."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._kept_bytes += len(data)
        super().data_received(data)
        if self._kept_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        self._kept_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._kept_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._kept_bytes = 0
        super().on_message_complete()
