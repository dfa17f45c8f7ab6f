"""Commands about jobs: submit, status, wait, cancel, list, workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.commands.common import NOT_ALL_SUCCEEDED, SUCCESS, AsJson, JobId, open_producer
from jobs.home import DEFAULT_MODEL, connected_settings
from jobs.states import State

if TYPE_CHECKING:
    from jobs.schema import Job


def submit(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    *,
    model: Annotated[str, typer.Option(help="A name of the catalog, a folder or a hub id.")] = DEFAULT_MODEL,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the answer and print it.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (greedy) to 2.")] = None,
    n: Annotated[int, typer.Option("--n", help="Number of answers.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="The answer ends before this text. Repeatable.")] = None,
    conversation: Annotated[str | None, typer.Option(help="Continue this conversation (any name).")] = None,
    deadline_seconds: Annotated[float | None, typer.Option(help="Later than that, the job expires.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key and request is the same job.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Kept. Repeatable.")] = None,
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="A gateway tells it when the job ends.")] = None,
    as_json: AsJson = False,
) -> int:
    """Submit one job. Prints its id, or with --wait its answer (exit status 3 if it did not succeed)."""
    fields: dict[str, Any] = {
        "model": model,
        "messages": _messages(system, sys.stdin.read() if prompt == "-" else prompt),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "n": n,
        "stop": stop or [],
        "conversation": conversation,
        "deadline_seconds": deadline_seconds,
        "idempotency_key": idempotency_key,
        "metadata": _pairs(metadata or []),
        "webhook": webhook,
    }
    with open_producer(connected_settings()) as producer:
        job = producer.submit(**fields)
        if wait:
            return _show_end(producer.wait(job.id), as_json=as_json)
    return _show(job, str(job.id), as_json=as_json)


def status(job_id: JobId, *, as_json: AsJson = False) -> int:
    """Show everything about one job."""
    from headrace import show

    with open_producer(connected_settings()) as producer:
        job = producer.get(job_id)
    if as_json:
        show.emit(show.job_json(job))
    else:
        show.job(job)
    return SUCCESS


def wait(
    job_id: JobId,
    *,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="Give up waiting after this.")] = None,
    as_json: AsJson = False,
) -> int:
    """Wait until a job has ended and print its answer (exit status 3 if it did not succeed)."""
    with open_producer(connected_settings()) as producer:
        return _show_end(producer.wait(job_id, timeout), as_json=as_json)


def cancel(job_id: JobId, *, as_json: AsJson = False) -> int:
    """End a waiting job at once; have a running one stopped. One that has ended stays as it is."""
    with open_producer(connected_settings()) as producer:
        job = producer.cancel(job_id)
    said = "will stop" if job.cancel_requested_at and not job.state.final else str(job.state)
    return _show(job, f"{job.id} {said}", as_json=as_json)


def list_jobs(
    *,
    state: Annotated[list[State] | None, typer.Option(help="Only jobs in this state. Repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, the newest first.")] = 20,
    as_json: AsJson = False,
) -> int:
    """List jobs, the newest first."""
    from headrace import show

    with open_producer(connected_settings()) as producer:
        jobs = producer.list(states=state or [], model=model, limit=limit)
    if as_json:
        show.emit({"jobs": [show.job_json(job) for job in jobs]})
    else:
        show.jobs(jobs)
    return SUCCESS


def workers(*, as_json: AsJson = False) -> int:
    """List live workers."""
    from headrace import show

    with open_producer(connected_settings()) as producer:
        live = producer.leases.list()
    if as_json:
        show.emit({"workers": [asdict(worker) for worker in live]})
    else:
        show.workers(live)
    return SUCCESS


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--metadata")
        pairs[name] = value
    return pairs


def _show(job: Job, text: str, *, as_json: bool) -> int:
    from headrace import show

    if as_json:
        show.emit(show.job_json(job))
    else:
        typer.echo(text)
    return SUCCESS


def _show_end(job: Job, *, as_json: bool) -> int:
    from headrace import show

    if as_json:
        show.emit(show.job_json(job))
    else:
        show.answer(job)
    return SUCCESS if job.state is State.SUCCEEDED else NOT_ALL_SUCCEEDED


def register(app: Any) -> None:
    """Put the commands into the application."""
    panel = "Jobs"
    for function in (submit, status, wait, cancel):
        app.command(rich_help_panel=panel)(function)
    app.command("list", rich_help_panel=panel)(list_jobs)
    app.command(rich_help_panel=panel)(workers)
