"""The commands `webhooks secret`, `list` and `retry`: what is told of ends, and what it is signed with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from headrace.commands.common import SUCCESS, AsJson, open_database
from jobs.home import connected_settings
from jobs.states import DeliveryState

if TYPE_CHECKING:
    from jobs.webhooks import Webhooks

app = typer.Typer(help="Webhooks: which ends were told to whom, and what that is signed with.")


@app.command()
def secret(
    *,
    tenant: Annotated[str, typer.Option(help="Whose webhooks it signs.")],
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Sign with a new one; for a day with the one before, too.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Show the secret with which receivers check a tenant's webhooks."""
    from headrace import show

    with _webhooks() as webhooks:
        if rotate:
            webhooks.rotate(tenant)
        newest = webhooks.secrets(tenant)[0]
    if as_json:
        show.emit({"tenant": tenant, "secret": newest})
    else:
        show.out().print(newest, soft_wrap=True)
    return SUCCESS


@app.command("list")
def list_deliveries(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    state: Annotated[DeliveryState | None, typer.Option(help="Only these.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> int:
    """List webhooks of jobs and batches that have ended, the newest first."""
    from headrace import show

    with _webhooks() as webhooks:
        records = webhooks.list(tenant, state=state, limit=limit)
    if as_json:
        show.emit({"webhooks": [asdict(record) | {"state": record.state} for record in records]})
    else:
        show.deliveries(records)
    return SUCCESS


@app.command()
def retry(
    delivery_id: Annotated[UUID | None, typer.Argument(metavar="[ID]", help="One, or all that were given up.")] = None,
    *,
    tenant: Annotated[str | None, typer.Option(help="All of this tenant's.")] = None,
    as_json: AsJson = False,
) -> int:
    """Try again what was given up."""
    from headrace import show

    if delivery_id is not None and tenant is not None:
        raise typer.BadParameter("goes without an ID", param_hint="--tenant")
    with _webhooks() as webhooks:
        if delivery_id is None:
            count = webhooks.retry_all(tenant)
        else:
            webhooks.retry(delivery_id)
            count = 1
    if as_json:
        show.emit({"retried": count})
    else:
        typer.echo(f"{count:,} to be tried again")
    return SUCCESS


@contextmanager
def _webhooks() -> Iterator[Webhooks]:
    from jobs.webhooks import Webhooks

    settings = connected_settings()
    with open_database(settings) as database:
        yield Webhooks(database, str(settings.secret))


def register(application: Any) -> None:
    """Put the commands into the application."""
    application.add_typer(app, name="webhooks", rich_help_panel="Deployment")
