"""The command `purge`: forget what was asked and answered."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import asdict
from typing import Annotated, Any

import typer

from headrace.commands.common import SUCCESS, AsJson, open_database
from jobs.home import connected_settings

_UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}


def purge(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's jobs. Default: every tenant's.")] = None,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Such as 30d, 12h, 90m, 0s. Default: as [retention_days] says."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Delete jobs that ended, with everything asked and answered. Their bills stay.

    Lines of a batch go with their batch, once its output was handed over.
    """
    from headrace import show
    from jobs.retention import Retention
    from jobs.signals import Signals
    from jobs.streams import Streams

    settings = connected_settings()
    seconds = None if older_than is None else _seconds(older_than)
    if seconds is None and not settings.retention_days:
        raise typer.BadParameter("is missing, and [retention_days] is empty", param_hint="--older-than")
    with (
        open_database(settings) as database,
        closing(Signals(settings)) as signals,
        closing(Streams(settings, signals)) as streams,
    ):
        retention = Retention(database, streams.forget)
        if seconds is not None:
            purged = retention.purge(seconds, tenant)
        else:
            purged = retention.keep_for(settings.retention_days, tenant)
    if as_json:
        show.emit({"purged": asdict(purged)})
    else:
        typer.echo(", ".join(f"{rows:,} {name}" for name, rows in asdict(purged).items()))
    return SUCCESS


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time such as 30d, 12h, 90m or 0s", param_hint="--older-than")
    return float(found[1]) * _UNITS[found[2]]


def register(app: Any) -> None:
    """Put the command into the application."""
    app.command(rich_help_panel="Deployment")(purge)
