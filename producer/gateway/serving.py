"""Serves the gateway over HTTP, until a signal."""

from __future__ import annotations

import uvicorn

from jobs.settings import Settings
from producer.client import Producer
from producer.gateway.app import create_app

LOOPBACK = "127.0.0.1"

# Clients keep connections open between requests; one that closes under a request costs it a try.
_KEEP_ALIVE_SECONDS = 75
# Streams that are open when the process is to end are cut then; their jobs are cancelled, those in the background not.
_GRACE_SECONDS = 5


def serve(settings: Settings, port: int, address: str = LOOPBACK) -> None:
    """Be the gateway, in this thread."""
    with Producer(settings) as producer:
        config = uvicorn.Config(
            create_app(producer),
            host=address,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        uvicorn.Server(config).run()
