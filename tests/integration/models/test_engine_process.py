"""The engine process and its client: real processes, real sockets, real signals."""

from __future__ import annotations

import queue
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from kit.waiting import wait_until
from models.catalog import Catalog, ModelSpec
from models.client import EngineClient
from models.protocol import Delta, Ended, EngineError, Event, GenerationRequest, Health, SamplingParams
from models.wire import dial

PATIENCE_SECONDS = 60.0


class Process:
    """One `python -m workers.engine`, its socket and its clients."""

    def __init__(self, folder: Path, spec: ModelSpec, *options: str) -> None:
        self.socket = folder / "engine.sock"
        self.log = folder / "executions.jsonl"
        arguments = ["--socket", str(self.socket), "--spec", spec.model_dump_json(), *options]
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "workers.engine", *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.clients: list[EngineClient] = []

    def client(self) -> EngineClient:
        client = EngineClient(self.socket)
        client.connect(PATIENCE_SECONDS)
        self.clients.append(client)
        return client

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts an engine process: an echo with the given table, or the given spec."""
    processes: list[Process] = []

    def run(*options: str, spec: ModelSpec | None = None, **table: Any) -> Process:
        spec = spec or Catalog.from_mapping({"echo": table}).get("echo")
        processes.append(Process(tmp_path, spec, *options))
        return processes[-1]

    yield run
    for process in processes:
        process.stop()


class Inbox:
    """Collects the events of requests, and waits for their ends."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ends: queue.SimpleQueue[Ended] = queue.SimpleQueue()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Ended):
            self._ends.put(event)

    def ends(self, count: int = 1) -> dict[str, Ended]:
        ended = [self._ends.get(timeout=PATIENCE_SECONDS) for _ in range(count)]
        return {end.id: end for end in ended}


def request(request_id: str, text: str = "hello", max_tokens: int = 1_000, **settings: Any) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(text.encode()), SamplingParams(max_tokens), **settings)


def until_running(client: EngineClient, rows: int = 1) -> Health:
    def running() -> Health | None:
        health = client.health(PATIENCE_SECONDS)
        return health if health.running == rows else None

    health = wait_until(running, PATIENCE_SECONDS, f"{rows} rows run")
    assert health is not None
    return health


SLOW = {"seconds_per_token": 0.02}
LONG = "x" * 1_000  # 20 s of it


def test_a_request_goes_there_and_its_events_come_back(start: Callable[..., Process]) -> None:
    """Whoever connects is greeted with the engine's health, asks, and gets the text and the end."""
    process, inbox = start(), Inbox()
    client = EngineClient(process.socket)
    process.clients.append(client)
    greeting = client.connect(PATIENCE_SECONDS)
    assert (greeting.model, greeting.engine, greeting.slots, greeting.pid) == ("echo", "echo", 256, process.popen.pid)
    client.submit(request("a", "héllo", stream=True), inbox)
    ended = inbox.ends()["a"]
    assert "".join(event.text for event in inbox.events if isinstance(event, Delta)) == "héllo"
    assert (ended.outcome, ended.choices[0].text, ended.usage.completion_tokens) == ("succeeded", "héllo", 6)
    assert stat.S_IMODE(process.socket.stat().st_mode) == 0o600


def test_a_thousand_requests_each_end_once(start: Callable[..., Process]) -> None:
    """Requests sent many at a time from several threads all come back, once and with their own text."""
    process, inbox = start(), Inbox()
    client = process.client()

    def send(thread: int) -> None:
        ids = [f"{thread}-{at}" for at in range(250)]
        client.submit_many((request(request_id, request_id), inbox) for request_id in ids)

    threads = [threading.Thread(target=send, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = inbox.ends(1_000)
    assert len(ended) == 1_000
    assert all(end.choices[0].text == request_id for request_id, end in ended.items())
    health = client.health(PATIENCE_SECONDS)
    assert sum(end.timings.busy_seconds for end in ended.values()) == pytest.approx(health.busy_seconds)


def test_a_bad_request_comes_back_and_harms_nobody(start: Callable[..., Process]) -> None:
    """What intake refuses ends as failed, not retryable, with the field's name; its neighbour is served."""
    client, inbox = start().client(), Inbox()
    unsendable = GenerationRequest("worse", (1,), SamplingParams(1, seed=2**70))
    client.submit_many([(request("bad", max_tokens=0), inbox), (unsendable, inbox), (request("good"), inbox)])
    ended = inbox.ends(3)
    assert (ended["worse"].error.code, ended["worse"].error.retryable) == ("invalid_request", False)
    assert (ended["bad"].error.code, ended["bad"].error.retryable) == ("invalid_request", False)
    assert ended["bad"].error.message.startswith("max_tokens:")
    assert ended["good"].outcome == "succeeded"


def test_an_open_id_is_refused_and_the_first_goes_on(start: Callable[..., Process]) -> None:
    """The same id twice: the second asker is told, the first gets its answer."""
    client, first, second = start(**SLOW).client(), Inbox(), Inbox()
    client.submit(request("a"), first)
    client.submit(request("a"), second)
    assert second.ends()["a"].error.code == "invalid_request"
    assert first.ends()["a"].outcome == "succeeded"


def test_cancel_and_drain_reach_the_engine(start: Callable[..., Process]) -> None:
    """A running request can be cancelled, waiting ones released, and the others end on their own."""
    client, inbox = start(slots=2, **SLOW).client(), Inbox()
    client.submit_many([(request("long", LONG), inbox), (request("short"), inbox), (request("waits"), inbox)])
    until_running(client, 2)
    client.drain()
    assert inbox.ends()["waits"].outcome == "released"
    client.cancel("long")
    ended = inbox.ends(2)
    assert (ended["long"].outcome, ended["short"].outcome) == ("cancelled", "succeeded")
    assert 0 < len(ended["long"].choices[0].text) < len(LONG)


def test_a_step_that_hangs_is_seen(start: Callable[..., Process]) -> None:
    """Health is answered while a step runs, and says how old the step is."""
    client, inbox = start(seconds_per_token=1_000).client(), Inbox()
    client.submit(request("a"), inbox)
    first = until_running(client)
    later = client.health(PATIENCE_SECONDS)
    assert first.step_seconds is not None
    assert later.step_seconds > first.step_seconds
    assert later.steps == 0


def test_a_killed_engine_ends_what_was_open_as_lost(start: Callable[..., Process]) -> None:
    """After SIGKILL each open request fails as engine_lost, retryable; what is asked later is given back."""
    process, inbox = start(**SLOW), Inbox()
    client = process.client()
    client.submit_many([(request("a", LONG), inbox), (request("b", LONG), inbox)])
    until_running(client, 2)
    process.popen.kill()
    ended = inbox.ends(2)
    assert {end.error.code for end in ended.values()} == {"engine_lost"}
    assert all(end.error.retryable and end.error.in_company for end in ended.values())
    assert client.lost.is_set()
    client.submit(request("late"), inbox)
    assert inbox.ends()["late"].outcome == "released"
    with pytest.raises(EngineError, match="lost"):
        client.health(PATIENCE_SECONDS)


def test_a_request_that_was_alone_when_its_engine_died_is_to_blame(start: Callable[..., Process]) -> None:
    """Nobody else was there."""
    process, inbox = start(**SLOW), Inbox()
    client = process.client()
    client.submit(request("a", LONG), inbox)
    until_running(client)
    process.popen.kill()
    error = inbox.ends()["a"].error
    assert (error.code, error.in_company) == ("engine_lost", False)


def test_a_new_client_takes_the_place_of_the_old(start: Callable[..., Process]) -> None:
    """The old client is lost and its requests are cancelled, so that the new one may ask for the same id at once."""
    process, old, new = start(slots=1, **SLOW), Inbox(), Inbox()
    first = process.client()
    first.submit_many([(request("a", LONG), old), (request("b", LONG), old)])
    until_running(first)
    second = process.client()
    second.submit(request("a", "again"), new)
    assert new.ends()["a"].choices[0].text == "again"
    assert {end.error.code for end in old.ends(2).values()} == {"engine_lost"}
    health = second.health(PATIENCE_SECONDS)
    assert (health.running, health.waiting) == (0, 0)


def test_requests_of_a_client_that_went_away_are_cancelled(start: Callable[..., Process]) -> None:
    """Nobody waits for them: the next client finds an idle engine."""
    process, inbox = start(**SLOW), Inbox()
    client = process.client()
    client.submit(request("a", LONG), inbox)
    until_running(client)
    client.close()
    assert inbox.ends()["a"].error.code == "engine_lost"
    until_running(process.client(), 0)


def test_rubbish_on_the_socket_costs_only_its_sender(start: Callable[..., Process]) -> None:
    """A frame that is not one ends that connection; the engine serves the next client."""
    process, inbox = start(), Inbox()
    process.client().close()
    rude = dial(process.socket)
    rude.receive()
    rude.connection.send_bytes(b"\xff{]")
    with pytest.raises((EOFError, OSError)):
        rude.receive()
    rude.close()
    client = process.client()
    client._send([("submit", {"id": "form"}), ("submit", 7), ("dance", None), ("cancel", None)])
    client.submit(request("a"), inbox)
    assert inbox.ends()["a"].outcome == "succeeded"


def test_a_listener_that_raises_harms_nobody_else(
    start: Callable[..., Process], caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in one request's listener is logged; other requests still get their events."""
    client, inbox = start().client(), Inbox()

    def broken(event: Event) -> None:
        raise ZeroDivisionError

    client.submit_many([(request("a"), broken), (request("b"), inbox)])
    assert inbox.ends()["b"].outcome == "succeeded"
    assert "listener of request a" in caplog.text


def test_sigterm_ends_the_process_with_status_0(start: Callable[..., Process]) -> None:
    """Asked to end, it closes the engine and leaves no socket; Ctrl-C is the supervisor's business."""
    process = start()
    client = process.client()
    process.popen.send_signal(signal.SIGINT)
    assert client.health(PATIENCE_SECONDS).pid == process.popen.pid
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(PATIENCE_SECONDS) == 0
    assert client.lost.wait(PATIENCE_SECONDS)
    assert not process.socket.exists()


def test_it_ends_when_its_standard_input_does(start: Callable[..., Process]) -> None:
    """If the supervisor dies the process ends at once, even in the middle of a step."""
    process, inbox = start(seconds_per_token=1_000), Inbox()
    client = process.client()
    client.submit(request("a"), inbox)
    until_running(client)
    process.popen.stdin.close()
    process.popen.stdin = None
    assert process.popen.wait(PATIENCE_SECONDS) == 0
    assert inbox.ends()["a"].error.code == "engine_lost"


def test_it_starts_where_a_killed_one_left_its_socket(start: Callable[..., Process]) -> None:
    """A stale socket does not stop the next start, and a client that dials in between waits for it."""
    first = start()
    first.client()
    first.stop()
    assert first.socket.exists()
    assert start().client().health(PATIENCE_SECONDS).pid != first.popen.pid


def test_each_execution_is_one_line_on_disk(start: Callable[..., Process], tmp_path: Path) -> None:
    """The execution log has a line for each request that was computed, none for those refused or released."""
    log = tmp_path / "executions.jsonl"
    process, inbox = start("--execution-log", str(log), slots=2, **SLOW), Inbox()
    client = process.client()
    requests = [request("a"), request("b"), request("waits"), request("bad", max_tokens=0)]
    client.submit_many([(each, inbox) for each in requests])
    until_running(client, 2)
    client.drain()
    inbox.ends(4)
    client.submit(request("a"), inbox)
    inbox.ends()
    lines = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "a"]
    assert {line["pid"] for line in lines} == {process.popen.pid}
    assert lines[0]["monotonic"] < lines[2]["monotonic"]


def test_a_model_that_cannot_be_loaded_is_an_exit_with_the_reason(start: Callable[..., Process]) -> None:
    """It says why in one JSON line and ends with status 1; no client is kept waiting longer than it asked."""
    process = start(spec=ModelSpec(name="none", path="/no/such/folder"))
    with pytest.raises(EngineError, match="no engine answered"):
        EngineClient(process.socket).connect(0.1)
    assert process.popen.wait(PATIENCE_SECONDS) == 1
    last_line = process.popen.stderr.read().splitlines()[-1]
    assert "no folder /no/such/folder" in orjson.loads(last_line)["message"]


def test_a_broken_engine_ends_the_process(start: Callable[..., Process], tmp_path: Path) -> None:
    """When the engine cannot go on, here because its log's disk is full, the process fails and clients are told."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    process, inbox = start("--execution-log", "/dev/full"), Inbox()
    process.client().submit(request("a"), inbox)
    assert inbox.ends()["a"].error.code == "engine_lost"
    assert process.popen.wait(PATIENCE_SECONDS) == 1


def test_asking_before_connecting_is_an_error(tmp_path: Path) -> None:
    """A client has to connect first."""
    client = EngineClient(tmp_path / "s")
    with pytest.raises(EngineError, match="connect first"):
        client.submit(request("a"), Inbox())
    client.close()
    assert list(tmp_path.iterdir()) == []
