"""Commands about what is wrong: doctor, failed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

from headrace.commands.common import FAILURE, SUCCESS, AsJson, Refused, open_producer
from jobs.home import connected_settings

if TYPE_CHECKING:
    from jobs.failures import DeadLetters
    from producer.client import Producer

Action = Annotated[Literal["list", "retry", "purge"], typer.Argument(help="list, retry or purge.")]
Ids = Annotated[list[UUID] | None, typer.Argument(metavar="[ID...]", help="Only these jobs.", show_default=False)]


def doctor(*, as_json: AsJson = False) -> int:
    """Check servers, migrations, clocks, workers, queues and leases, and say what to do (exit status 1: something)."""
    from headrace import show
    from headrace.doctor import examine

    findings = examine(connected_settings())
    well = all(finding.well for finding in findings)
    if as_json:
        show.emit({"well": well, "findings": [asdict(finding) for finding in findings]})
    else:
        show.findings(findings)
    return SUCCESS if well else FAILURE


def failed(
    action: Action = "list",
    ids: Ids = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="retry, purge: every failed job.")] = False,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    older_than_days: Annotated[float, typer.Option(metavar="DAYS", min=0, help="purge: only those.")] = 0.0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="list, retry: at most so many, the latest first.")] = 50,
    as_json: AsJson = False,
) -> int:
    """Jobs that failed: list them with error, attempts and worker, retry them as new jobs, or purge them.

    A retry is a new job with the same request; asked for twice, it is the same one. What was purged stays billed.
    """
    from headrace import show
    from jobs.failures import DeadLetters

    if action != "list" and not (ids or every):
        raise Refused(f"name the jobs to {action}, or give --all")
    with open_producer(connected_settings()) as producer:
        letters = DeadLetters(producer.database, producer.tenant_id)
        if action == "purge":
            purged = letters.purge(ids=ids or (), model=model, older_than_days=older_than_days)
            return _tell({"purged": purged}, f"{purged} jobs purged", as_json=as_json)
        chosen = letters.list(ids=ids or (), model=model, limit=limit)
        if action == "retry":
            retried = {str(one.id): str(_retry(producer, letters, one.id)) for one in chosen}
            text = "\n".join(f"{old} runs again as {new}" for old, new in retried.items())
            return _tell({"retried": retried}, text or "no failed jobs", as_json=as_json)
    if as_json:
        show.emit({"failed": [asdict(one) for one in chosen]})
    else:
        show.dead_letters(chosen)
    return SUCCESS


def _retry(producer: Producer, letters: DeadLetters, job_id: UUID) -> UUID:
    """The job that asks the same again. Its key makes it one, however often it is asked for."""
    request = letters.request(job_id)
    metadata = dict(request.metadata) | {"retry_of": str(job_id)}
    again = request.model_copy(update={"idempotency_key": f"retry:{job_id}", "metadata": metadata})
    return producer.submit(again).id


def _tell(value: dict[str, Any], text: str, *, as_json: bool) -> int:
    from headrace import show

    if as_json:
        show.emit(value)
    else:
        typer.echo(text)
    return SUCCESS


def register(app: Any) -> None:
    """Put the commands into the application."""
    for function in (doctor, failed):
        app.command(rich_help_panel="Health")(function)
