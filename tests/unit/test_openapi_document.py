"""The gateway's OpenAPI document."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from jobs.settings import Settings
from producer.gateway.app import create_app
from producer.openai.requests import ENDPOINTS


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Of an application that serves nobody."""
    settings = Settings.load(
        database_url="postgresql://nobody@localhost/none", broker_url="redis://localhost", secret="s" * 40
    )
    return create_app(SimpleNamespace(database=None, settings=settings)).openapi()  # type: ignore[arg-type]


def test_every_body_is_described(document: dict[str, Any]) -> None:
    """Whatever is posted has a schema, but for what is cancelled, where nothing is posted."""
    posts = {path: methods["post"] for path, methods in document["paths"].items() if "post" in methods}
    assert len(posts) >= 10
    assert {path for path, post in posts.items() if "requestBody" not in post} == {
        path for path in posts if path.endswith("/cancel")
    }


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    """Within the document itself."""
    names = {text.split('"')[0] for text in orjson.dumps(document).decode().split("#/components/schemas/")[1:]}
    assert names
    assert names <= document["components"]["schemas"].keys()


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_limits_are_told(document: dict[str, Any], endpoint: str) -> None:
    """Those that the request is checked against."""
    body = document["paths"][endpoint]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", ENDPOINTS[endpoint].prompt_name]
    assert body["properties"]["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert set(ENDPOINTS[endpoint].sampling) <= body["properties"].keys()


def test_it_says_who_needs_a_key(document: dict[str, Any]) -> None:
    """Everybody, but for the probes."""
    assert document["security"] == [{"key": []}]
    open_ones = {path for path, methods in document["paths"].items() for one in methods.values() if "security" in one}
    assert open_ones == {"/health", "/ready"}
