"""A worker in memory: real hands and verdicts, with an engine, a store and a committer that do as they are told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from jobs.errors import StoreUnavailable
from jobs.ids import new_id
from jobs.schema import JobRequest
from jobs.settings import Settings
from jobs.signing import MessageSigner
from jobs.states import Lane
from jobs.store import Claim, Settlement
from models.catalog import Catalog, ModelSpec
from models.client import OnEvent
from models.prompt import load_prompt_format
from models.protocol import Ended, GenerationRequest, Outcome
from workers.company import Company
from workers.host import Hands, Held, Host


def claim_of(token: UUID | None = None, **fields: Any) -> Claim:
    """The claim of a small job, but for the fields given."""
    defaults: dict[str, Any] = {
        "id": new_id(),
        "token": token or uuid4(),
        "tenant_id": "local",
        "model": "echo",
        "lane": Lane.INTERACTIVE,
        "priority": 5,
        "attempt": 1,
        "max_attempts": 3,
        "queue_seconds": 0.0,
        "seconds_left": None,
        "conversation": None,
        "turn": None,
        "metered": False,
        "request": JobRequest(model="echo", prompt="hello"),
    }
    return Claim(**(defaults | fields))


@dataclass
class FakeEngine:
    """Takes requests; with `at_once` each ends as soon as it is submitted, else when the test says so."""

    at_once: Outcome | None = "succeeded"
    ready: threading.Event = field(default_factory=threading.Event)
    submitted: dict[str, OnEvent] = field(default_factory=dict)
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    most_open: int = 0

    def submit(self, requests: Sequence[tuple[GenerationRequest, OnEvent]]) -> None:
        for request, on_event in requests:
            self.requests.append(request)
            self.submitted[request.id] = on_event
        self.most_open = max(self.most_open, len(self.submitted))
        if self.at_once:
            for request, _ in requests:
                self.end(request.id, self.at_once)

    def end(self, request_id: str, outcome: Outcome) -> None:
        self.submitted.pop(request_id)(Ended(request_id, outcome))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


@dataclass
class FakeStore:
    """A backlog to claim from; `outages` is how many calls fail first."""

    waiting: list[JobRequest] = field(default_factory=list)
    committing: list[JobRequest] = field(default_factory=list)  # in the backlog once somebody has looked thrice
    looks: int = 0
    outages: int = 0
    asked: list[int] = field(default_factory=list)  # how many rows each claim wanted

    def claim(self, job_id: UUID, worker_id: UUID, token: UUID) -> Claim | None:
        return next(iter(self._take(1, [token])), None)

    def claim_bulk(self, model: str, worker_id: UUID, tokens: Sequence[UUID]) -> list[Claim]:
        return self._take(len(tokens), tokens)

    def _take(self, count: int, tokens: Iterable[UUID]) -> list[Claim]:
        self.asked.append(count)
        if self.outages:
            self.outages -= 1
            raise StoreUnavailable("Postgres is away")
        rows, self.waiting = self.waiting[:count], self.waiting[count:]
        return [claim_of(token, request=row, lane=Lane.BULK) for row, token in zip(rows, tokens, strict=False)]

    def exists(self, _: UUID) -> bool:
        self.looks += 1
        if self.committing and self.looks < 3:
            return False
        self.waiting += self.committing
        self.committing = []
        return True

    def history(self, *_: Any) -> list[dict[str, str]]:
        raise StoreUnavailable("Postgres is away")


@dataclass
class FakeCommitter:
    """Commits at once. `counts` False: every job had become somebody else's."""

    hands: Hands
    counts: bool = True
    settled: list[Settlement] = field(default_factory=list)

    def settle(self, settlement: Settlement, then: Callable[[bool], None]) -> None:
        self.settled.append(settlement)
        self.hands.drop([settlement.token])
        then(self.counts)


class FakeHost(SimpleNamespace):
    """What `workers.tasks` uses of a host."""

    settings: Settings
    spec: ModelSpec
    hands: Hands
    engine: FakeEngine
    company: Company
    store: FakeStore
    committer: FakeCommitter
    draining: threading.Event
    drained_by: threading.Lock
    signer: MessageSigner
    slots: int

    def real(self) -> Host:
        """Itself, as the code under test knows it."""
        return cast(Host, self)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """A host of four slots with an engine that answers at once."""
    spec = Catalog.from_mapping({"echo": {"slots": 4}}).get("echo")
    hands = Hands()
    engine = FakeEngine()
    engine.ready.set()
    return FakeHost(
        settings=Settings.load(database_url="postgresql://nowhere/x", broker_url="redis://nowhere/0", secret="s" * 32),
        spec=spec,
        slots=spec.slots,
        served_by="echo on echo, none, cpu",
        worker_id=uuid4(),
        format=load_prompt_format(spec),
        hands=hands,
        engine=engine,
        company=Company(lambda: len(engine.submitted)),
        store=FakeStore(),
        committer=FakeCommitter(hands),
        draining=threading.Event(),
        drained_by=threading.Lock(),
        signer=MessageSigner("s" * 32),
    )


@pytest.fixture
def held() -> Callable[..., Held]:
    """A claimed job, but for the fields of its claim that are given."""
    return lambda stop=None, **fields: Held(claim_of(**fields), stop)
