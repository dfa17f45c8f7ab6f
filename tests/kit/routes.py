"""Every route of the gateway, as the application itself has them: what is added to it is walked without being named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Route

from jobs.settings import Settings
from producer.gateway.app import create_app


def application() -> FastAPI:
    """One that serves nobody."""
    urls = {"database_url": "postgresql://nobody@localhost/none", "broker_url": "redis://localhost"}
    settings = Settings.load(**urls, secret="s" * 40)
    return create_app(SimpleNamespace(database=None, settings=settings))  # type: ignore[arg-type]


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of each. Raises AssertionError if the application's document knows more."""
    found = sorted({(method, route.path) for route in _flat(app.routes) for method in route.methods or ()})
    document = app.openapi()["paths"]
    described = {(method.upper(), path) for path, methods in document.items() for method in methods}
    assert {(method, _plain(path)) for method, path in found} >= described
    return found


def _flat(routes: Sequence[BaseRoute]) -> Iterator[Route]:
    """Those of included routers, too, whatever kind of thing the framework keeps them in."""
    for route in routes:
        inner: Any = getattr(route, "original_router", None) or getattr(route, "app", None)
        if isinstance(route, Route):
            yield route
        elif hasattr(inner, "routes"):
            yield from _flat(inner.routes)
        else:
            raise AssertionError(f"{route!r} cannot be walked")


def _plain(path: str) -> str:
    """As a document has it: without the kind of a parameter."""
    return path.replace(":path}", "}")
