"""The application: what is put together, in which order a request passes through it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio.to_thread import run_sync
from fastapi import FastAPI, Response

from jobs.keys import Keys
from producer.client import Producer
from producer.gateway import batches, completions, conversations, errors, files, metrics, models, page, responses
from producer.gateway.document import ERRORS, documented
from producer.gateway.door import OPEN_PATHS, Door
from producer.gateway.errors import json_reply
from producer.gateway.metrics import Metered, Metrics, served
from producer.gateway.service import opened
from producer.gateway.sessions import Sessions
from producer.gateway.shares import Shares

_ROUTERS = (
    models.router,
    files.router,
    batches.router,
    responses.router,
    conversations.router,
    completions.router,
    page.router,
    metrics.router,
)
# Beside the file itself: the other fields of the form.
_FORM_BYTES = 100_000


def create_app(producer: Producer, keys: Keys | None = None) -> FastAPI:
    """The gateway on this producer, which stays the caller's to close."""
    settings, keys = producer.settings, keys or Keys(producer.database)
    file_bytes = settings.gateway_file_bytes + _FORM_BYTES
    sessions = Sessions(keys, str(producer.settings.secret))

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with opened(producer, sessions) as gateway:
            await gateway.admission.look(0.0)
            app.state.gateway = gateway
            await run_sync(app.state.metrics.watch, gateway)
            with served(app.state.metrics, settings.gateway_metrics_address):
                yield

    app = FastAPI(title="Headrace", lifespan=life, docs_url="/docs", redoc_url=None, responses=ERRORS)
    app.state.metrics = Metrics()
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    _add_probes(app)
    app.openapi = documented(app, OPEN_PATHS)  # type: ignore[method-assign]
    app.add_middleware(
        Door,
        keys=keys,
        sessions=sessions,
        shares=Shares(settings.gateway_tenant_requests, settings.gateway_body_bytes, file_bytes),
        body_bytes=settings.gateway_body_bytes,
        file_bytes=file_bytes,
    )
    app.add_middleware(Metered, metrics=app.state.metrics)  # the outermost: it sees what the door turns away, too
    return app


def _add_probes(app: FastAPI) -> None:
    @app.get("/health", tags=["probes"])
    async def health() -> Response:
        """Say that this process runs."""
        return json_reply({"status": "ok"})

    @app.get("/ready", tags=["probes"])
    async def ready() -> Response:
        """Say whether requests are taken in: 503 while Postgres is away."""
        admission = app.state.gateway.admission
        status = 200 if admission.store_answers else 503
        return json_reply({"ready": admission.store_answers, "models": sorted(admission.served)}, status)
