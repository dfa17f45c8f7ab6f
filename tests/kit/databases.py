"""Databases of a test's own: made from a template in which the migrations have run once, dropped at the end."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy import make_url

SECRET = "a secret that every process of a test shares"


@contextmanager
def migrated_template(server_url: str) -> Iterator[str]:
    """Name of a database on that server, migrated to the newest version, to make others from."""
    with temporary_database(server_url) as url:
        from headrace.migrations import upgrade

        upgrade(url)
        yield _name(url)


@contextmanager
def temporary_database(server_url: str, template: str = "template1") -> Iterator[str]:
    """URL of a new database on that server. It is dropped at the end, even under open connections."""
    name = f"headrace_test_{secrets.token_hex(6)}"
    _execute(server_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        url = make_url(server_url).set(drivername="postgresql+psycopg", database=name)
        yield url.render_as_string(hide_password=False)
    finally:
        _execute(server_url, f'DROP DATABASE "{name}" WITH (FORCE)')


def connect(url: str) -> psycopg.Connection:
    """A plain connection in autocommit mode to a URL as SQLAlchemy writes it."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True)


def _execute(server_url: str, statement: str) -> None:
    with connect(server_url) as connection:
        connection.execute(statement.encode())


def _name(url: str) -> str:
    name = make_url(url).database
    assert name is not None
    return name
