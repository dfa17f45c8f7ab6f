"""The commands `keys create`, `list`, `revoke` and `rotate`: who may come in over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from headrace.commands.common import SUCCESS, AsJson, open_database
from jobs.home import connected_settings
from jobs.states import Role

if TYPE_CHECKING:
    from jobs.keys import ApiKey, KeyRecord, Keys

app = typer.Typer(help="API keys: who may come in over HTTP, for which tenant, and for how much.")

KeyId = Annotated[UUID, typer.Argument(metavar="ID", help="The key's id, not its secret.")]
Commas = "Names with commas between them."


@app.command()
def create(
    *,
    tenant: Annotated[str, typer.Option(help="Whose jobs the key's holder hands in and sees.")],
    tier: Annotated[str | None, typer.Option(help="A name for the kind of service, such as premium.")] = None,
    quota_tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompts and answers within a minute. Default: no limit.")
    ] = None,
    models: Annotated[str | None, typer.Option(help=f"{Commas} Default: every model.")] = None,
    roles: Annotated[str, typer.Option(help="Of submit, read, admin. " + Commas)] = "submit,read",
    as_json: AsJson = False,
) -> int:
    """Make a key. Its secret is shown now and never again."""
    allowed = None if models is None else _names(models, "--models")
    with _keys() as keys:
        key, secret = keys.create(
            _tenant(tenant),
            tier=tier,
            models=allowed,
            roles=_roles(roles),
            quota_tokens_per_minute=quota_tokens_per_minute,
        )
    return _show_secret(key, secret, as_json=as_json)


@app.command("list")
def list_keys(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only keys of this tenant.")] = None,
    as_json: AsJson = False,
) -> int:
    """List keys, revoked ones too, the newest first."""
    from headrace import show

    with _keys() as keys:
        records = keys.list(tenant)
    if as_json:
        show.emit({"keys": [_record_json(record) for record in records]})
    else:
        show.keys(records)
    return SUCCESS


@app.command()
def revoke(key_id: KeyId, *, as_json: AsJson = False) -> int:
    """Refuse a key from now on: everywhere within 5 s."""
    from headrace import show

    with _keys() as keys:
        keys.revoke(key_id)
    if as_json:
        show.emit({"id": str(key_id), "revoked": True})
    else:
        typer.echo(f"{key_id} is revoked")
    return SUCCESS


@app.command()
def rotate(key_id: KeyId, *, as_json: AsJson = False) -> int:
    """Give a key a new secret; the old one is refused everywhere within 5 s."""
    with _keys() as keys:
        key, secret = keys.rotate(key_id)
    return _show_secret(key, secret, as_json=as_json)


@contextmanager
def _keys() -> Iterator[Keys]:
    from jobs.keys import Keys

    with open_database(connected_settings()) as database:
        yield Keys(database)


def _tenant(name: str) -> str:
    if not name.strip():
        raise typer.BadParameter("must not be empty", param_hint="--tenant")
    return name


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise typer.BadParameter(f"{text!r} holds an empty name", param_hint=option)
    return names


def _roles(text: str) -> list[Role]:
    try:
        return [Role(name) for name in _names(text, "--roles")]
    except ValueError:
        known = ", ".join(Role)
        raise typer.BadParameter(f"{text!r}: roles are {known}", param_hint="--roles") from None


def _show_secret(key: ApiKey, secret: str, *, as_json: bool) -> int:
    from headrace import show

    if as_json:
        show.emit({"id": str(key.id), "key": secret, "tenant": key.tenant_id})
    else:
        show.out().print(show.facts([("id", str(key.id)), ("tenant", key.tenant_id), ("key", secret)]), soft_wrap=True)
        show.err().print("The key is not shown again.", style="dim")
    return SUCCESS


def _record_json(record: KeyRecord) -> dict[str, Any]:
    key = record.key
    return {
        "id": str(key.id),
        "tenant": key.tenant_id,
        "tier": key.tier,
        "models": key.models,
        "roles": sorted(key.roles),
        "quota_tokens_per_minute": key.quota_tokens_per_minute,
        "created_at": record.created_at,
        "rotated_at": record.rotated_at,
        "revoked_at": record.revoked_at,
    }


def register(application: Any) -> None:
    """Put the commands into the application."""
    application.add_typer(app, name="keys", rich_help_panel="Deployment")
