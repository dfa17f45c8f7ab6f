"""The web page for people, and the routes it reads: jobs, batches, workers and queues as they are now."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse

from jobs.errors import Forbidden, NotFound, Unauthorized
from jobs.leases import Worker
from jobs.schema import Job, JobRequest
from jobs.states import Role, State
from producer.gateway.batches import batch_object
from producer.gateway.errors import ApiError, json_reply, not_found
from producer.gateway.intake import json_object, required
from producer.gateway.service import Reader, Submitter, Visitor, in_thread
from producer.gateway.sessions import cookie_for, session_in

router = APIRouter(tags=["page"], include_in_schema=False)

_FOLDER = Path(__file__).parent / "static"
_FILES = {"page.css": "text/css", "page.js": "text/javascript"}
# Nothing but our own files, no frames, no forms that go elsewhere: text of a model can do nothing here.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
_JOBS = 50
_BATCHES = 20


@router.get("/")
async def index() -> Response:
    """The page."""
    return FileResponse(_FOLDER / "page.html", headers=_HEADERS, media_type="text/html")


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """What it is made of."""
    if name not in _FILES:
        raise ApiError(404, "Not Found.")
    return FileResponse(_FOLDER / name, headers=_HEADERS, media_type=_FILES[name])


@router.post("/login")
async def login(request: Request) -> Response:
    """A key for a session. Raises Forbidden if another site asks for it."""
    if request.headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
        raise Forbidden("only our own page signs in")
    secret = required(await json_object(request), "key", str, "a string")
    sessions = request.app.state.gateway.sessions
    session = await in_thread(sessions.begin, secret)
    headers = {"Set-Cookie": cookie_for(session, secure=request.url.scheme == "https")}
    return json_reply({"csrf": sessions.csrf_of(session)}, headers=headers)


@router.post("/ui/logout")
async def logout(request: Request, _: Reader) -> Response:
    """End the session of this browser."""
    return json_reply({}, headers={"Set-Cookie": cookie_for("", secure=request.url.scheme == "https")})


@router.get("/ui/session")
async def session(request: Request, visitor: Reader) -> Response:
    """Who is here, and the second word for what changes anything."""
    given = session_in(request.headers.get("cookie", ""))
    if given is None:
        raise Unauthorized("no session")
    csrf = visitor.gateway.sessions.csrf_of(given)
    return json_reply({"tenant": visitor.tenant_id, "roles": sorted(visitor.key.roles), "csrf": csrf})


@router.get("/ui/now")
async def now(visitor: Reader, state: State | None = None) -> Response:
    """Jobs and batches of the tenant, and for an admin workers and queues."""
    producer = visitor.producer
    jobs = await in_thread(partial(producer.list, states=[state] if state else [], limit=_JOBS))
    batches = await in_thread(partial(producer.api_batches.list, visitor.tenant_id, after=None, limit=_BATCHES))
    fields = {
        "jobs": [_brief(job) for job in jobs],
        "batches": [batch_object(batch, batch.counts) for batch in batches],
    }
    return json_reply(fields | (await in_thread(_engine_room, visitor) if _is_admin(visitor) else {}))


def _is_admin(visitor: Visitor) -> bool:
    try:
        visitor.key.require(Role.ADMIN)
    except Forbidden:
        return False
    return True


def _engine_room(visitor: Visitor) -> dict[str, Any]:
    workers = [_worker(worker) for worker in visitor.producer.leases.list()]
    return {"workers": workers, "queues": visitor.producer.store.waiting()}


def _worker(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.id.hex[:8],
        "state": str(worker.state),
        "model": worker.model,
        "host": worker.host,
        "slots": worker.slots,
        "running": worker.running,
        "ready": worker.ready,
        "busy_seconds": worker.busy_seconds,
        "cpu_cores": worker.figures.cpu_cores,
        "resident_bytes": worker.figures.resident_bytes,
        "gpu": worker.figures.gpu,
    }


def _brief(job: Job) -> dict[str, Any]:
    return {
        "id": str(job.id),
        "state": str(job.state),
        "model": job.model,
        "created_at": job.created_at.isoformat(),
        "finished_at": job.finished_at and job.finished_at.isoformat(),
        "endpoint": job.endpoint,
    }


@router.get("/ui/jobs/{job_id}")
async def job(job_id: UUID, visitor: Reader) -> Response:
    """A job's life."""
    found, request = await _found(visitor, job_id)
    fields = found.model_dump(mode="json", exclude={"choices", "call"})
    fields["answers"] = [choice.text for choice in found.choices]
    fields["asked"] = request.chat() if request.messages is not None else request.prompt
    return json_reply(fields)


@router.post("/ui/jobs/{job_id}/cancel")
async def cancel(job_id: UUID, visitor: Submitter) -> Response:
    """End it."""
    await _found(visitor, job_id)
    return json_reply(_brief(await in_thread(visitor.producer.cancel, job_id)))


@router.post("/ui/jobs/{job_id}/retry")
async def retry(job_id: UUID, visitor: Submitter) -> Response:
    """Ask the same once more, as a new job."""
    found, request = await _found(visitor, job_id)
    again = request.model_copy(update={"idempotency_key": None})
    made = await in_thread(partial(visitor.producer.submit, again, endpoint=found.endpoint, call=found.call))
    return json_reply(_brief(made))


async def _found(visitor: Visitor, job_id: UUID) -> tuple[Job, JobRequest]:
    try:
        return await in_thread(visitor.producer.store.get_call, job_id, visitor.tenant_id)
    except NotFound:
        raise not_found("job", str(job_id)) from None
