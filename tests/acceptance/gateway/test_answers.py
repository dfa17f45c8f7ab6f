"""Every answer is what the gateway's own document says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from kit.documents import faults
from kit.gateways import RunningGateway
from kit.systems import PATIENCE_SECONDS
from kit.waiting import wait_until

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
Seen = tuple[str, str, dict[str, Any]]


@pytest.fixture(scope="module")
def http(gateway: RunningGateway) -> Iterator[httpx2.Client]:
    """Nobody's client, with an admin's key."""
    headers = {"Authorization": f"Bearer {gateway.key('answers', roles=['admin'])[1]}"}
    with httpx2.Client(base_url=gateway.url, headers=headers, timeout=PATIENCE_SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def document(http: httpx2.Client) -> dict[str, Any]:
    answered: dict[str, Any] = http.get("/openapi.json").json()
    return answered


class Walk:
    """Calls, and what came back by route."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http
        self.seen: list[Seen] = []

    def call(self, method: str, route: str, *names: str, **fields: Any) -> dict[str, Any]:
        """The answer of a route whose places in braces are these names."""
        path = route
        for name in names:
            path = f"{path[: path.index('{')]}{name}{path[path.index('}') + 1 :]}"
        answer = self._http.request(method, path, **fields)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        self.seen.append((method, route, body))
        return body

    def until(self, done: Callable[[dict[str, Any]], bool], method: str, route: str, name: str) -> dict[str, Any]:
        """The first answer for which that holds; those before are seen, too."""

        def look() -> dict[str, Any] | None:
            body = self.call(method, route, name)
            return body if done(body) else None

        return wait_until(look, PATIENCE_SECONDS, f"{route} has ended")


def responses(walk: Walk) -> None:
    asked = {"model": "tiny-chat", "input": "What is 12 + 30?", "instructions": "Be kind.", "metadata": {"a": "b"}}
    more = {"top_logprobs": 2, "include": ["message.output_text.logprobs"], "user": "ann", "max_output_tokens": 3}
    more |= {"text": {"format": {"type": "text"}}, "prompt_cache_key": "k", "safety_identifier": "s", "top_p": 1}
    more |= {"tool_choice": "auto", "max_tool_calls": 1, "parallel_tool_calls": False, "temperature": 0}
    made = walk.call("post", "/v1/responses", json=asked | more)
    walk.call("post", "/v1/responses", json={"model": "echo", "input": "x", "previous_response_id": made["id"]})
    begun = walk.call("post", "/v1/responses", json={"model": "slow", "input": "word " * 200, "background": True})
    walk.call("get", "/v1/responses/{name}", begun["id"])
    walk.call("post", "/v1/responses/{name}/cancel", begun["id"])
    failed = {"model": "echo", "input": "x", "background": True, "previous_response_id": begun["id"]}
    slow = walk.call("post", "/v1/responses", json={"model": "slow", "input": "word " * 200, "background": True})
    behind = walk.call("post", "/v1/responses", json=failed | {"previous_response_id": slow["id"]})
    walk.call("post", "/v1/responses/{name}/cancel", slow["id"])
    walk.until(lambda body: body["status"] == "failed", "get", "/v1/responses/{name}", behind["id"])
    walk.call("get", "/v1/responses/{name}/input_items", made["id"])
    walk.call("post", "/v1/responses/input_tokens", json=asked)
    walk.call("delete", "/v1/responses/{name}", made["id"])


def completions(walk: Walk) -> None:
    chat = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 3}
    walk.call("post", CHAT, json=chat)
    walk.call("post", CHAT, json=chat | {"n": 2, "logprobs": True, "top_logprobs": 2})
    text = {"model": "tiny-chat", "prompt": "What is", "max_tokens": 3}
    walk.call("post", "/v1/completions", json=text)
    walk.call("post", "/v1/completions", json=text | {"logprobs": 2, "echo": True})


def conversations(walk: Walk) -> None:
    route = "/v1/conversations/{name}"
    walk.call("post", "/v1/conversations", json={})
    made = walk.call("post", "/v1/conversations", json={"items": HELLO, "metadata": {"a": "b"}})
    walk.call("post", "/v1/responses", json={"model": "echo", "input": "x", "conversation": made["id"]})
    walk.call("get", route, made["id"])
    walk.call("post", route, made["id"], json={"metadata": {"c": "d"}})
    added = walk.call("post", f"{route}/items", made["id"], json={"items": [{"role": "assistant", "content": "so"}]})
    walk.call("get", f"{route}/items", made["id"])
    walk.call("get", f"{route}/items/{{item}}", made["id"], added["first_id"])
    walk.call("delete", f"{route}/items/{{item}}", made["id"], added["first_id"])
    walk.call("delete", route, made["id"])


def batches(walk: Walk) -> None:
    line = {"custom_id": "one", "method": "POST", "url": CHAT, "body": {"model": "echo", "messages": HELLO}}
    for content in (json.dumps(line), "nonsense"):
        files = {"file": ("in.jsonl", content.encode())}
        file = walk.call("post", "/v1/files", files=files, data={"purpose": "batch"})
        asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        made = walk.call("post", "/v1/batches", json=asked | {"metadata": {"a": "b"}})
        walk.until(lambda body: body["status"] in {"completed", "failed"}, "get", "/v1/batches/{name}", made["id"])
    idle = json.dumps(line | {"body": line["body"] | {"model": "idle"}})  # type: ignore[operator]
    file = walk.call("post", "/v1/files", files={"file": ("in.jsonl", idle.encode())}, data={"purpose": "batch"})
    made = walk.call("post", "/v1/batches", json=asked | {"input_file_id": file["id"]})
    walk.call("post", "/v1/batches/{name}/cancel", made["id"])
    walk.call("get", "/v1/batches")
    walk.call("get", "/v1/files")
    walk.call("get", "/v1/files/{name}", file["id"])
    walk.call("delete", "/v1/files/{name}", file["id"])


def others(walk: Walk) -> None:
    for path in ("/v1/models", "/health", "/ready"):
        walk.call("get", path)
    walk.call("get", "/v1/models/{model}", "tiny-chat")


def test_every_answer_is_as_the_document_says(http: httpx2.Client, document: dict[str, Any]) -> None:
    """Of every route that answers JSON: no field is missing, of another type, or not in the document."""
    walk = Walk(http)
    for part in (responses, completions, conversations, batches, others):
        part(walk)
    described = {
        (method, path): content["application/json"]["schema"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if "application/json" in (content := operation["responses"].get("200", {}).get("content", {}))
    }
    found = [
        f"{method} {route} {fault}"
        for method, route, body in walk.seen
        for fault in faults(document, described[method, route], body)
    ]
    assert found == []
    assert {(method, route) for method, route, _ in walk.seen} == described.keys()


def test_the_check_itself_sees_every_fault(document: dict[str, Any]) -> None:
    """Or the test above would hold in vain."""
    schema = {"$ref": "#/components/schemas/ModelList"}
    good = {"id": "m", "object": "model", "created": 1, "owned_by": "us"}
    assert list(faults(document, schema, {"object": "list", "data": [good]})) == []
    for bad in (
        {"id": 5},
        {"created": True},
        {"created": 1.5},
        {"object": "list"},
        {"owned_by": None},
        {"more": 1},
    ):
        assert len(list(faults(document, schema, {"object": "list", "data": [good | bad]}))) == 1
    del good["id"]
    assert len(list(faults(document, schema, {"object": "list", "data": [good]}))) == 1
