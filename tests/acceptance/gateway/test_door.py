"""Who is let in, and what is turned away: every route without a key, and a table of hostile requests."""

from __future__ import annotations

import gzip
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import psutil
import pytest

from jobs.states import Role
from kit.gateways import RunningGateway, gateway_on
from kit.systems import System
from kit.waiting import wait_until
from producer.gateway.shares import TURNS

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
OPEN = {"/", "/health", "/ready", "/login"}


@pytest.fixture(scope="module")
def http(gateway: RunningGateway) -> Iterator[httpx2.Client]:
    """A plain client with a good key."""
    headers = {"Authorization": f"Bearer {gateway.key()[1]}"}
    with httpx2.Client(base_url=gateway.url, headers=headers, timeout=60) as client:
        yield client


def check_envelope(reply: httpx2.Response) -> dict[str, Any]:
    """The one form of errors."""
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"].startswith("req_")
    return dict(body["error"])


# == who ========================================================================================================


def test_no_route_without_a_key(gateway: RunningGateway, http: httpx2.Client) -> None:
    """401 from every route of the application's own document, but for the few that are open."""
    paths = http.get("/openapi.json").json()["paths"]
    walked = [(method, path) for path, methods in paths.items() for method in methods if path not in OPEN]
    assert len(walked) >= 25
    with httpx2.Client(base_url=gateway.url) as nobody:
        for method, path in [*walked, ("get", "/docs"), ("get", "/openapi.json"), ("get", "/v1/nothing")]:
            reply = nobody.request(method.upper(), re.sub(r"\{\w+(:path)?\}", "x", path))
            assert (path, reply.status_code) == (path, 401)
            assert check_envelope(reply)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Basic eDp5", "Bearer x y", "bearer nothing", "Bearer " + "k" * 5_000, "hr-x"]
)
def test_no_other_word_lets_in(gateway: RunningGateway, header: str) -> None:
    """Whatever the header looks like."""
    reply = httpx2.get(f"{gateway.url}/v1/models", headers={"Authorization": header})
    assert reply.status_code == 401
    check_envelope(reply)


def test_a_revoked_key_is_refused(gateway: RunningGateway) -> None:
    """By a gateway that has never seen it, at once."""
    key, secret = gateway.key()
    gateway.keys.revoke(key.id)
    with pytest.raises(openai.AuthenticationError):
        gateway.client(secret=secret).models.list()


def test_roles(gateway: RunningGateway) -> None:
    """Who may only read hands nothing in, and the other way round."""
    reader = gateway.client(secret=gateway.key(roles=[Role.READ])[1])
    submitter = gateway.client(secret=gateway.key(roles=[Role.SUBMIT])[1])
    assert reader.models.list().data
    for refused in (
        lambda: reader.responses.create(model="echo", input="x"),
        lambda: reader.files.create(file=("x", b"x"), purpose="batch"),
        submitter.models.list,
        submitter.files.list,
    ):
        with pytest.raises(openai.PermissionDeniedError):
            refused()
    assert submitter.responses.create(model="echo", input="x").output_text == "x"


def test_the_probes_are_open(gateway: RunningGateway) -> None:
    """A load balancer has no key."""
    assert httpx2.get(f"{gateway.url}/health").json() == {"status": "ok"}
    ready = httpx2.get(f"{gateway.url}/ready").json()
    assert ready["ready"] is True
    assert "echo" in ready["models"]


# == hostile ====================================================================================================


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "echo", "messages": HELLO} | fields).encode()


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


def structured(schema: Any) -> bytes:
    return chat(model="tiny-chat", response_format=SCHEMA | {"json_schema": {"name": "x", "schema": schema}})


BAD_BODIES: list[tuple[str, bytes]] = [
    (CHAT, b""),
    (CHAT, b"nothing"),
    (CHAT, b"[]"),
    (CHAT, b'"x"'),
    (CHAT, b"null"),
    (CHAT, b"\xff\xfe"),
    (CHAT, b'{"model": "echo", "messages": NaN}'),
    (CHAT, b'{"model": "\\ud800", "messages": []}'),
    (CHAT, chat(n=10**9)),
    (CHAT, chat(n=-1)),
    (CHAT, chat(n="2")),
    (CHAT, chat(n=True)),
    (CHAT, chat(max_tokens=2**63)),
    (CHAT, chat(max_tokens=2**70)),
    (CHAT, chat(max_tokens=-1)),
    (CHAT, chat(seed=2**80)),
    (CHAT, chat(temperature=1e400)),
    (CHAT, chat(temperature=-0.1)),
    (CHAT, chat(top_p=0)),
    (CHAT, chat(logprobs=True, top_logprobs=21)),
    (CHAT, chat(top_logprobs=2)),
    (CHAT, chat(stop=["x"] * 17)),
    (CHAT, chat(stop=["x" * 2000])),
    (CHAT, chat(stop=[""])),
    (CHAT, chat(stop=[1])),
    (CHAT, chat(logit_bias={str(token): 1 for token in range(2000)})),
    (CHAT, chat(logit_bias={"x": 1})),
    (CHAT, chat(messages=[])),
    (CHAT, chat(messages="hello")),
    (CHAT, chat(messages=[{"role": "nobody", "content": "x"}])),
    (CHAT, chat(messages=[{"role": "user"}])),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
    (CHAT, chat(messages=[{"role": "user", "content": {"a": 1}}])),
    (CHAT, chat(messages=[None])),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": []}]}])),
    (CHAT, chat(messages=[{"role": [], "content": "x", "type": {}}])),
    (CHAT, chat(model=None)),
    (CHAT, chat(model=1)),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}] * 1000)),
    (CHAT, chat(functions=[{"name": "f"}])),
    (CHAT, chat(audio={"voice": "x"})),
    (CHAT, chat(modalities=["audio"])),
    (CHAT, chat(response_format={"type": "grammar"})),
    (CHAT, chat(stream="yes")),
    (CHAT, chat(stream_options=[])),
    (CHAT, chat(response_format=SCHEMA)),  # echo only repeats
    (CHAT, structured({"description": "x" * 70_000})),
    (CHAT, structured({"$ref": "#"})),
    (CHAT, structured({"not": {}})),
    (CHAT, structured({"allOf": [{"properties": {f"{i}.{j}": {} for j in range(60)}} for i in range(40)]})),
    (CHAT, structured({"type": "string", "pattern": "(?=a)b"})),
    (CHAT, b'{"model": "echo", "messages": [' + b"[]," * 300_000 + b"1]}"),
    (CHAT, b'{"model": "echo", "stop": [' + b"1," * 400_000 + b"1]}"),
    (CHAT, b'{"model": "echo"' + b',"x":1' * 150_000 + b"}"),
    (CHAT, b'{"model": "echo", "messages": ' + nested(100_000).encode() + b"}"),
    (CHAT, b'{"model": "echo", "messages": ' + nested(500).encode() + b"}"),
    (CHAT, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    ("/v1/completions", json.dumps({"model": "echo", "prompt": ["x"] * 129}).encode()),
    ("/v1/completions", json.dumps({"model": "echo", "prompt": []}).encode()),
    ("/v1/completions", json.dumps({"model": "echo", "prompt": [[10**9]]}).encode()),
    ("/v1/completions", json.dumps({"model": "echo", "prompt": ["x", 1]}).encode()),
    ("/v1/completions", json.dumps({"model": "echo", "prompt": "x", "suffix": "y"}).encode()),
    ("/v1/completions", json.dumps({"model": "echo", "prompt": "x", "best_of": 3}).encode()),
    ("/v1/responses", json.dumps({"model": "echo"}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": {}}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": [{"type": "item_reference", "id": "x"}]}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "background": "yes"}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "tools": [{"type": "web_search"}]}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "metadata": {"a": 1}}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "metadata": {"a" * 65: "b"}}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "text": {"format": {"type": "x"}}}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "text": "x"}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "include": "x"}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "conversation": 5}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "previous_response_id": 5}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "prompt": {"id": "x"}}).encode()),
    ("/v1/responses", json.dumps({"model": "echo", "input": "x", "instructions": 5}).encode()),
    ("/v1/conversations", json.dumps({"items": [{"role": "user", "content": "x"}] * 21}).encode()),
    ("/v1/conversations", json.dumps({"items": {}}).encode()),
    ("/v1/conversations", json.dumps({"metadata": []}).encode()),
    ("/v1/batches", json.dumps({"input_file_id": 5, "endpoint": CHAT, "completion_window": "24h"}).encode()),
    ("/v1/batches", json.dumps({"input_file_id": "x", "endpoint": ["x"], "completion_window": "24h"}).encode()),
    ("/v1/files", b"no form"),
]


@pytest.mark.parametrize(
    ("path", "body"),
    BAD_BODIES,
    ids=lambda value: value.decode(errors="replace")[:60] if isinstance(value, bytes) else value,
)
def test_a_bad_body_is_refused(http: httpx2.Client, path: str, body: bytes) -> None:
    """400, in the one form, and the gateway goes on."""
    reply = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert check_envelope(reply)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/files/..%2F..%2Fetc%2Fpasswd/content", 404),
        ("/v1/files/../../etc/passwd", 404),
        ("/v1/files/file-%0d%0aSet-Cookie:x/content", 404),
        ("/v1/files/file-%00", 400),
        ("/v1/files?purpose=%00", 400),
        ("/v1/files?limit=0", 400),
        ("/v1/files?limit=x", 400),
        ("/v1/files?limit=99999999999999999999999999", 400),
        ("/v1/files?order=sideways", 400),
        ("/v1/files?after=x", 400),
        ("/v1/batches?limit=101", 400),
        ("/v1/batches?after=batch_zz", 400),
        ("/v1/responses/resp_%0a", 404),
        ("/v1/responses/resp_" + "0" * 31, 404),
        ("/v1/responses/resp_" + "0" * 32, 404),
        ("/v1/responses/" + "0" * 4_000, 404),
        ("/v1/conversations/conv_%27%20OR%201=1/items", 404),
        ("/v1/models/..%2F..%2Fetc", 404),
        ("/v1/models/%2Fetc", 404),
        ("/v1/chat/completions/x", 404),
        ("/v1/nothing", 404),
        ("/v1/chat/completions", 405),
    ],
)
def test_a_bad_address_is_refused(http: httpx2.Client, path: str, status: int) -> None:
    """In the one form; nothing of it comes back as a header."""
    reply = http.get(path)
    assert reply.status_code == status
    check_envelope(reply)
    assert "set-cookie" not in reply.headers


def test_a_folder_is_no_model(http: httpx2.Client) -> None:
    """Elsewhere any folder is one; nobody may find out over HTTP which there are."""
    replies = [http.post(CHAT, content=chat(model=name)) for name in ("/etc", "/nowhere", "~", "owner/name")]
    assert [reply.status_code for reply in replies] == [404] * 4
    assert {reply.json()["error"]["code"] for reply in replies} == {"model_not_found"}


def test_a_compressed_body_is_refused_unread(http: httpx2.Client) -> None:
    """Ten kilobytes that would be a gigabyte are never unpacked."""
    bomb = gzip.compress(b"0" * 10_000_000)
    reply = http.post(CHAT, content=bomb, headers={"Content-Encoding": "gzip"})
    assert reply.status_code == 400


def test_a_long_body_is_refused_before_it_is_read(gateway: RunningGateway) -> None:
    """By its length alone, and without a key."""
    address = urlsplit(gateway.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 500000000\r\n\r\n")
        assert b" 413 " in connection.recv(65_536).split(b"\r\n")[0]


def test_a_long_body_without_a_length_is_refused(http: httpx2.Client) -> None:
    """As soon as it is longer than what is accepted."""

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 65_536

    try:
        reply = http.post(CHAT, content=endless())
    except httpx2.TransportError:
        return  # it hung up on us
    assert reply.status_code == 413


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        ("GET /health HTTP/1.1\r\n", "X: y\r\n"),
        ("GET /health HTTP/1.1\r\nX: ", "y"),
        ("GET /", "x"),
        (f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n0\r\n", "X: y\r\n"),
    ],
    ids=["headers", "header", "address", "trailers"],
)
def test_a_head_without_an_end_is_refused(gateway: RunningGateway, begin: str, piece: str) -> None:
    """Long before it fills the memory, whichever part of it does not end."""
    address = urlsplit(gateway.url)
    most, sent, block = 50_000_000, 0, piece.encode() * (65_536 // len(piece))
    with socket.create_connection((address.hostname, address.port)) as connection, suppress(ConnectionError):
        connection.sendall(begin.encode())
        while sent < most:
            connection.sendall(block)
            sent += len(block)
    assert sent < most


def peak_bytes() -> int:
    """The most memory that this process had since it was last asked."""
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(peak)


def test_memory_stays_flat(http: httpx2.Client) -> None:
    """However often everything hostile is sent, even at its peak, gateway and client together: less than 50 MB more."""
    bodies = [*BAD_BODIES, (CHAT, chat(messages=[{"role": "user", "content": "x" * 900_000}], n=10**9))]
    peaks = []
    for _ in range(4):
        for path, body in bodies:
            assert http.post(path, content=body).status_code == 400
        peaks.append(peak_bytes())
    # The first time loads what is loaded once; `peak_bytes` counts from one time to the next.
    assert max(peaks[2:]) - peaks[1] < 50_000_000


def test_a_file_does_not_stay_in_memory(http: httpx2.Client) -> None:
    """Less than 50 MB more than what the client has of it."""
    process = psutil.Process()
    before = process.memory_info().rss
    content = b"x" * 60_000_000
    reply = http.post("/v1/files", files={"file": ("big", content)}, data={"purpose": "user_data"})
    size = len(content)
    del content
    assert reply.status_code == 200, reply.text
    with http.stream("GET", f"/v1/files/{reply.json()['id']}/content") as stream:
        assert sum(len(block) for block in stream.iter_raw()) == size
    # The client runs in this process too, and had the whole file at once.
    assert process.memory_info().rss - before < 50_000_000 + 2 * size


# == shares =====================================================================================================


def test_a_tenant_has_a_share_of_the_open_requests(system: System) -> None:
    """429, and when to come back, for the tenant alone; and only while they are open."""
    settings = system.settings.model_copy(update={"gateway_tenant_requests": 2})
    with gateway_on(settings) as small:
        client, stranger = small.client(), small.client("stranger")
        long: Any = {"model": "slow", "input": "word " * 2_000, "stream": True}
        streams = [client.responses.create(**long) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as refused:
            client.models.list()
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        assert stranger.models.list().data
        for stream in streams:
            stream.close()
        wait_until(lambda: succeeds(client.models.list), 30, "the tenant's requests are over")


def succeeds(call: Callable[[], object]) -> bool:
    try:
        call()
    except openai.RateLimitError:
        return False
    return True


def test_whoever_has_no_key_says_little(gateway: RunningGateway) -> None:
    """All that there is to send is a key: the rest is not read."""
    reply = httpx2.post(f"{gateway.url}/login", content=b"x" * 20_000)
    assert reply.status_code == 413


def test_one_who_sends_slowly_keeps_nobody_waiting(gateway: RunningGateway) -> None:
    """Not even the same tenant: a turn begins when the body is here."""
    secret = gateway.key()[1]
    address = urlsplit(gateway.url)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\nContent-Length: 1000\r\n\r\n{{"
    with ExitStack() as open_:
        for _ in range(2 * TURNS):
            connection = open_.enter_context(socket.create_connection((address.hostname, address.port)))
            connection.sendall(head.encode())
        assert gateway.client(secret=secret).responses.create(model="echo", input="x").output_text == "x"


def test_the_door_to_a_full_queue(system: System) -> None:
    """429, and when to come back; nothing more is queued."""
    settings = system.settings.model_copy(update={"gateway_waiting_jobs": 3})
    with gateway_on(settings) as small:
        client = small.client()
        made = [client.responses.create(model="idle", input="x", background=True) for _ in range(3)]
        with pytest.raises(openai.RateLimitError) as refused:
            client.responses.create(model="idle", input="x", background=True)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        for one in made:
            client.responses.cancel(one.id)
