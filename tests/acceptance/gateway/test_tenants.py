"""Another tenant's ids, on every route that takes one and in every body that holds one: they are as unknown ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import httpx2
import openai
import pytest

from jobs.states import Role
from kit.gateways import RunningGateway
from kit.routes import application, routes_of

# What follows these is nobody's.
SHARED = {"/static/{name}", "/v1/models/{model:path}"}
# By the part of a path before the id.
PREFIXES = {
    "files": "file-",
    "batches": "batch_",
    "responses": "resp_",
    "conversations": "conv_",
    "items": "msg_",
    "jobs": "",
}
# By the field of a body.
FIELDS = {"input_file_id": "files", "previous_response_id": "responses", "conversation": "conversations"}
# What such a route wants besides, or it would refuse every id.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/batches": {"endpoint": "/v1/responses", "completion_window": "24h"},
    "/v1/responses": {"model": "echo", "input": "x"},
    "/v1/responses/input_tokens": {"model": "echo", "input": "x"},
    "/v1/conversations/{name}": {"metadata": {}},
    "/v1/conversations/{name}/items": {"items": [{"role": "user", "content": "x"}]},
}

ROUTES = [(method, path) for method, path in routes_of(application()) if "{" in path and path not in SHARED]
BORNE = [
    (path, field)
    for path, methods in application().openapi()["paths"].items()
    for field in methods.get("post", {})
    .get("requestBody", {})
    .get("content", {})
    .get("application/json", {})
    .get("schema", {})
    .get("properties", {})
    if field.endswith("_id") or field == "conversation"
]


@pytest.fixture(scope="module")
def theirs(client: openai.OpenAI) -> dict[str, str]:
    """Ids that exist, of another tenant than the one who asks."""
    response = client.responses.create(model="echo", input="x", background=True)
    talk = client.conversations.create(items=[{"role": "user", "content": "x"}])
    [item] = client.conversations.items.list(talk.id).data
    file = client.files.create(file=("x.jsonl", b"{}\n"), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    return {
        "files": file.id,
        "batches": batch.id,
        "responses": response.id,
        "conversations": talk.id,
        "items": str(item.id),
        "jobs": str(UUID(response.id.removeprefix("resp_"))),
    }


def unknown(theirs: dict[str, str]) -> dict[str, str]:
    """The same that nobody has."""
    return {kind: PREFIXES[kind] + (uuid4().hex if PREFIXES[kind] else str(uuid4())) for kind in theirs}


@pytest.fixture(scope="module")
def ask(gateway: RunningGateway) -> Iterator[Callable[..., httpx2.Response]]:
    """As whom it says; on the page's routes as somebody who has signed in there."""

    def ask(tenant: str, method: str, path: str, body: dict[str, Any] | None) -> httpx2.Response:
        return clients[tenant, path.startswith("/ui/")].request(method, path, json=body)

    clients: dict[tuple[str, bool], httpx2.Client] = {}
    for tenant in ("local", "stranger"):
        secret = gateway.key(tenant, roles=list(Role))[1]
        clients[tenant, False] = httpx2.Client(
            base_url=gateway.url, headers={"Authorization": f"Bearer {secret}"}, timeout=60
        )
        page = clients[tenant, True] = httpx2.Client(base_url=gateway.url, timeout=60)
        page.headers["X-CSRF-Token"] = page.post("/login", json={"key": secret}).json()["csrf"]
    yield ask
    for one in clients.values():
        one.close()


def filled(path: str, ids: dict[str, str]) -> str:
    """The path with an id of the right kind in each place. Raises KeyError of a kind that nobody has thought of."""
    return re.sub(r"/(\w+)/\{[\w:]+\}", lambda found: f"/{found[1]}/{ids[found[1]]}", path)


def answer(reply: httpx2.Response, ids: dict[str, str]) -> tuple[int, str]:
    """What is told, but for the ids themselves."""
    text = reply.text
    for kind, name in ids.items():
        text = text.replace(name, kind)
    return reply.status_code, text


def test_there_is_something_to_walk() -> None:
    """The walk sees the page's routes too, which the document leaves out."""
    assert len(ROUTES) >= 19
    assert ("POST", "/ui/jobs/{job_id}/cancel") in ROUTES
    assert {field for _, field in BORNE} == set(FIELDS)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_an_id_in_a_path(method: str, path: str, theirs: dict[str, str], ask: Callable[..., httpx2.Response]) -> None:
    """Not found, in the same words; and whose it is finds it as it was."""
    random, body = unknown(theirs), BODIES.get(path)
    told = answer(ask("stranger", method, filled(path, theirs), body), theirs)
    assert told == answer(ask("stranger", method, filled(path, random), body), random)
    assert told[0] == 404
    if method == "GET":
        assert ask("local", method, filled(path, theirs), None).status_code == 200


@pytest.mark.parametrize(("path", "field"), BORNE)
def test_an_id_in_a_body(path: str, field: str, theirs: dict[str, str], ask: Callable[..., httpx2.Response]) -> None:
    """Refused in the same words; its owner is not."""
    told = []
    for ids in (theirs, unknown(theirs)):
        body = BODIES[path] | {field: ids[FIELDS[field]]}
        told.append(answer(ask("stranger", "POST", path, body), ids))
    assert told[0] == told[1]
    assert told[0][0] in {400, 404}
    assert ask("local", "POST", path, BODIES[path] | {field: theirs[FIELDS[field]]}).status_code == 200
