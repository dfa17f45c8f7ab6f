"""Commands for deployments: migrate, worker, serve, bench, flower, version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.commands.common import SUCCESS, AsJson, Gpus, check_models
from jobs.home import DEFAULT_MODEL, StackError, child_environment, connected_settings

Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port. Default: a free one.")]


def migrate(*, as_json: AsJson = False) -> int:
    """Bring the database to the newest schema."""
    from headrace import show
    from headrace.stack import migrate as migrate_database

    migrate_database(connected_settings())
    if as_json:
        show.emit({"migrated": True})
    else:
        typer.echo("the database is up to date")
    return SUCCESS


def worker(
    *,
    model: Annotated[str, typer.Option(help="Model to serve.")] = DEFAULT_MODEL,
    gpus: Gpus = None,
    health: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Show there, for probes, that it lives and is ready.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Serve one model in the foreground. Its log is on stderr; SIGTERM or Ctrl-C drains it."""
    from headrace import show
    from jobs.logs import set_up_logging
    from workers.supervisor import run

    settings = connected_settings()
    check_models(settings, [model])
    os.environ.update(child_environment(settings))
    if as_json:
        show.emit({"model": model, "pid": os.getpid()})
    set_up_logging("supervisor")
    return run(model, gpus, health=health)


def serve(
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8000,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    as_json: AsJson = False,
) -> int:
    """Serve OpenAI's API over HTTP in the foreground, for those who hold a key (`headrace keys create`).

    Its log is on stderr; SIGTERM or Ctrl-C ends it. Any number may run; put a proxy with TLS before them.
    """
    from headrace import gateway, show
    from jobs.logs import set_up_logging

    if not gateway.installed():
        raise StackError('the gateway is not installed here: pip install "headrace[gateway]"')
    from producer.gateway.serving import serve as serve_gateway

    settings = connected_settings().for_gateway()
    where = gateway.place(port, address)
    if as_json:
        show.emit({"url": where.url, "pid": os.getpid()})
    else:
        typer.echo(f"{where.url}/v1")
    set_up_logging("gateway")
    serve_gateway(settings, port, address)
    return SUCCESS


def bench(
    *,
    model: Annotated[str, typer.Option(help="A name of the catalog, a folder or a hub id.")] = DEFAULT_MODEL,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter requests.")] = False,
    as_json: AsJson = False,
) -> int:
    """Load a model here, without servers, and measure it: tokens per second, time to first token, time between."""
    from dataclasses import asdict

    from headrace import show
    from headrace.bench import measure
    from jobs.settings import Settings

    settings = Settings.load()
    check_models(settings, [model])
    figures = asdict(measure(settings, model, quick=quick))
    if as_json:
        show.emit(figures)
    else:
        show.out().print(show.figures(figures))
    return SUCCESS


def flower(
    *,
    port: Port = None,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    as_json: AsJson = False,
) -> int:
    """Show workers and jobs in a browser, behind a password: FLOWER_BASIC_AUTH (user:password), or one made now."""
    from headrace import flower as page
    from headrace import show

    if not page.installed():
        raise StackError('Flower is not installed here: pip install "headrace[flower]"')
    settings = connected_settings()
    given = page.AUTH_VARIABLE in os.environ
    access = page.grant(port, address)
    # A password that was given is known already, and this output may be a log.
    password = f"as {page.AUTH_VARIABLE} says" if given else access.password
    login = {"url": access.url, "user": access.user, "password": password}
    if as_json:
        show.emit(login)
    else:
        show.out().print(show.facts(list(login.items())))
    os.environ.update(access.environment)
    page.serve(settings, access.port, address)
    return SUCCESS


def version(*, as_json: AsJson = False) -> int:
    """Print the version."""
    import platform

    from headrace import __version__, show

    if as_json:
        show.emit({"headrace": __version__, "python": platform.python_version()})
    else:
        typer.echo(f"headrace {__version__}")
    return SUCCESS


def register(app: Any) -> None:
    """Put the commands into the application."""
    for function in (migrate, worker, serve, bench, flower, version):
        app.command(rich_help_panel="Deployment")(function)
