"""The way to the engine: across its restarts, its silences, and its busy seconds."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from kit.waiting import wait_until
from models.client import OnEvent
from models.protocol import FIRST_STEPS, Ended, EngineError, Event, GenerationRequest, Health, SamplingParams
from workers import engine_link as module
from workers.engine_link import EngineLink
from workers.watchdog import Watchdog

PATIENCE_SECONDS = 10.0
HANG_SECONDS = 30.0
REQUEST = GenerationRequest("one", (1, 2), SamplingParams(max_tokens=1))


def health_of(engine: int, busy_seconds: float = 0.0, step_seconds: float | None = None, *, steps: int = 0) -> Health:
    """What the engine of that number says of itself."""
    return Health(
        model="echo",
        engine="echo",
        quantization="none",
        device="cpu",
        slots=4,
        context_tokens=100,
        running=0,
        waiting=0,
        steps=steps,
        busy_seconds=busy_seconds,
        step_seconds=step_seconds,
        first_steps_seconds=0.0,
        later_steps_seconds=0.0,
        started_at=float(engine),
        pid=engine,
    )


@dataclass
class Engines:
    """The engine processes there are: at most one at a time, which may be silent."""

    running: Health | None = None
    silent: bool = False
    clients: list[FakeClient] = field(default_factory=list)
    killed: list[tuple[int, int]] = field(default_factory=list)

    def die(self) -> None:
        self.running = None
        self.clients[-1].lost.set()


class FakeClient:
    """A connection to whichever engine runs."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self.lost = threading.Event()
        self.submitted: list[str] = []
        self.cancelled: list[str] = []

    def connect(self, timeout_seconds: float) -> Health:
        if self._engines.running is None:
            raise EngineError("no engine answered")
        self._engines.clients.append(self)
        return self._engines.running

    def health(self, timeout_seconds: float) -> Health:
        if self.lost.is_set() or self._engines.silent or self._engines.running is None:
            raise EngineError("no answer")
        return self._engines.running

    def submit_many(self, requests: Sequence[tuple[GenerationRequest, OnEvent]]) -> None:
        self.submitted += [request.id for request, _ in requests]

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def close(self) -> None:
        self.lost.set()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    """No engine yet."""
    engines = Engines()
    kill = SimpleNamespace(kill=lambda pid, number: engines.killed.append((pid, number)))
    monkeypatch.setattr(module, "os", kill)
    monkeypatch.setattr(module, "EngineClient", lambda _: FakeClient(engines))
    return engines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes when a test says so."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def opened(engines: Engines) -> Iterator[Callable[..., EngineLink]]:
    """Opens a link to an engine."""
    links: list[EngineLink] = []

    def open_link(health: Health, hang_seconds: float | None = HANG_SECONDS) -> EngineLink:
        engines.running = health
        links.append(EngineLink(Path("/nowhere"), Watchdog(hang_seconds)))
        assert links[-1].open(1.0) == health
        return links[-1]

    yield open_link
    for link in links:
        link.close()


def test_a_link_without_an_engine_does_not_open(engines: Engines) -> None:
    """The worker cannot begin without its engine."""
    with pytest.raises(EngineError):
        EngineLink(Path("/nowhere"), Watchdog()).open(0.0)


def test_requests_without_an_engine_are_released(engines: Engines, opened: Callable[..., EngineLink]) -> None:
    """Between two engines a request ends at once as untouched, and a cancel is ignored."""
    link = opened(health_of(1))
    engines.die()
    wait_until(lambda: not link.ready.is_set(), PATIENCE_SECONDS, "the loss is noticed")
    wait_until(lambda: link._client is None, PATIENCE_SECONDS, "the connection is given up")
    events: list[Event] = []
    link.submit([(REQUEST, events.append)])
    link.cancel("one")
    assert events == [Ended("one", "released")]
    assert link.health() is None


def test_the_next_engine_is_found(engines: Engines, opened: Callable[..., EngineLink]) -> None:
    """After a restart requests go to the new engine."""
    link = opened(health_of(1))
    link.submit([(REQUEST, lambda _: None)])
    engines.die()
    engines.running = health_of(2)
    wait_until(lambda: len(engines.clients) == 2 and link.ready.is_set(), PATIENCE_SECONDS, "the new engine is found")
    link.submit([(REQUEST, lambda _: None)])
    link.cancel("one")
    assert [client.submitted for client in engines.clients] == [["one"], ["one"]]
    assert engines.clients[1].cancelled == ["one"]


def test_busy_seconds_add_up_over_engines(engines: Engines, opened: Callable[..., EngineLink]) -> None:
    """What an engine worked before we came is not ours; what each worked since is, also across a restart."""
    link = opened(health_of(1, busy_seconds=100.0))
    assert link.busy_seconds == 0.0
    for seconds in (103.0, 103.0, 107.5):
        engines.running = health_of(1, busy_seconds=seconds)
        link.health()
    assert link.busy_seconds == 7.5

    engines.die()
    engines.running = health_of(2, busy_seconds=1.0)
    wait_until(lambda: len(engines.clients) == 2, PATIENCE_SECONDS, "the new engine is found")
    wait_until(link.health, PATIENCE_SECONDS, "it answers")
    assert link.busy_seconds == 8.5


def test_a_step_that_hangs_ends_the_engine(engines: Engines, opened: Callable[..., EngineLink]) -> None:
    """A step may take as long as the setting says; one that takes longer costs the process its life."""
    link = opened(health_of(7))
    engines.running = health_of(7, step_seconds=HANG_SECONDS)
    assert link.health() == engines.running
    assert engines.killed == []
    engines.running = health_of(7, step_seconds=HANG_SECONDS + 1)
    assert link.health() is None
    assert engines.killed == [(7, signal.SIGKILL)]


def test_an_engine_that_stays_silent_is_ended(
    engines: Engines, opened: Callable[..., EngineLink], clock: SimpleNamespace
) -> None:
    """One that answers nothing at all for as long hangs too; a short silence is only a heartbeat without it."""
    link = opened(health_of(7))
    clock.now += 1000.0
    assert link.health() is not None  # it answered, after however long
    engines.silent = True
    clock.now += HANG_SECONDS
    assert link.health() is None
    assert engines.killed == []
    clock.now += 1.0
    assert link.health() is None
    assert engines.killed == [(7, signal.SIGKILL)]


def test_an_engine_that_starts_silent_has_the_patience_of_first_steps(
    engines: Engines, opened: Callable[..., EngineLink], clock: SimpleNamespace
) -> None:
    """It is held against what engines here took at first, not against the pace of the one before it."""
    link = opened(health_of(7, steps=FIRST_STEPS - 1), hang_seconds=None)
    engines.silent = True
    clock.now += 120.0
    assert link.health() is None
    assert engines.killed == []
    clock.now += 1.0
    assert link.health() is None
    assert engines.killed == [(7, signal.SIGKILL)]


def test_an_engine_that_is_gone_is_not_ended_again(
    engines: Engines, opened: Callable[..., EngineLink], clock: SimpleNamespace
) -> None:
    """Its number may be another process's by now."""
    link = opened(health_of(7))
    clock.now += 1000.0
    engines.die()
    assert link.health() is None
    assert engines.killed == []
