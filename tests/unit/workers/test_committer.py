"""Group commit, with a store that does as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import cast
from uuid import UUID, uuid4

import pytest

from jobs.errors import StoreUnavailable
from jobs.schema import Choice, JobError
from jobs.states import AttemptOutcome
from jobs.store import Settled, Settlement, Store
from workers.committer import GROUP_ROWS, Committer

PATIENCE_SECONDS = 10.0


class FakeStore:
    """Takes settlements; a gate holds the first call back, and `refuses` says which ones it raises at."""

    def __init__(self) -> None:
        self.groups: list[list[Settlement]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.outages = 0
        self.refuses: Callable[[Settlement], bool] = lambda _: False
        self.stale: set[UUID] = set()

    def settle(self, settlements: Sequence[Settlement]) -> Settled:
        self.entered.set()
        assert self.gate.wait(PATIENCE_SECONDS)
        if self.outages:
            self.outages -= 1
            raise StoreUnavailable("Postgres is away")
        if any(self.refuses(settlement) for settlement in settlements):
            raise ValueError("cannot be stored")
        self.groups.append(list(settlements))
        return Settled(frozenset(s.id for s in settlements if s.id not in self.stale))


class Told:
    """Remembers what was announced."""

    def __init__(self) -> None:
        self.tokens: list[UUID] = []
        self.done: set[UUID] = set()
        self.breaks = False

    def __call__(self, settlements: Sequence[Settlement], settled: Settled) -> None:
        self.tokens += [settlement.token for settlement in settlements]
        self.done |= settled.done
        if self.breaks:
            raise RuntimeError("nobody listens")


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def told() -> Told:
    return Told()


@contextmanager
def committing(store: FakeStore, told: Told) -> Iterator[Committer]:
    """A committer that is closed whatever happens."""
    committer = Committer(cast(Store, store), told)
    committer.start()
    try:
        yield committer
    finally:
        store.gate.set()
        committer.close()


def settlement(text: str = "hello") -> Settlement:
    """A job that succeeded with this text."""
    choice = Choice(index=0, text=text, finish_reason="stop")
    return Settlement(uuid4(), uuid4(), AttemptOutcome.SUCCEEDED, choices=(choice,))


def settle(committer: Committer, one: Settlement) -> Future[bool]:
    """Queue it; the future tells what the committer says."""
    said: Future[bool] = Future()
    committer.settle(one, said.set_result)
    return said


def test_what_comes_during_a_commit_is_the_next_group(store: FakeStore, told: Told) -> None:
    """While one transaction is under way the settlements that arrive wait, and then go together, in order."""
    many = [settlement() for _ in range(50)]
    with committing(store, told) as committer:
        first = settle(committer, many[0])
        assert store.entered.wait(PATIENCE_SECONDS)
        others = [settle(committer, one) for one in many[1:]]
        store.gate.set()
        assert all(future.result(PATIENCE_SECONDS) for future in [first, *others])
    assert store.groups == [many[:1], many[1:]]
    assert told.tokens == [one.token for one in many]


def test_a_group_has_a_largest_size(store: FakeStore, told: Told) -> None:
    """However many wait, one transaction takes GROUP_ROWS at most."""
    with committing(store, told) as committer:
        futures = [settle(committer, settlement())]
        assert store.entered.wait(PATIENCE_SECONDS)
        futures += [settle(committer, settlement()) for _ in range(GROUP_ROWS + 1)]
        store.gate.set()
        assert all(future.result(PATIENCE_SECONDS) for future in futures)
    assert [len(group) for group in store.groups] == [1, GROUP_ROWS, 1]


def test_whoever_settles_hears_whether_it_counted(
    store: FakeStore, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    """False for a job that has become somebody else's: it leaves our hands all the same, and the log names it."""
    store.gate.set()
    ours, stale = settlement(), settlement()
    store.stale = {stale.id}
    with committing(store, told) as committer:
        assert settle(committer, ours).result(PATIENCE_SECONDS) is True
        assert settle(committer, stale).result(PATIENCE_SECONDS) is False
    assert told.tokens == [ours.token, stale.token]
    assert told.done == {ours.id}
    [late] = [message for message in caplog.messages if "came too late" in message]
    assert str(stale.id) in late
    assert str(ours.id) not in late


def test_an_outage_of_postgres_is_waited_for(store: FakeStore, told: Told) -> None:
    """What was computed is kept and offered again until Postgres takes it."""
    store.outages = 3
    store.gate.set()
    one = settlement()
    with committing(store, told) as committer:
        assert settle(committer, one).result(PATIENCE_SECONDS) is True
    assert (store.groups, told.tokens) == ([[one]], [one.token])


def test_waiters_are_told_before_whoever_settles(store: FakeStore) -> None:
    """Whoever waits for the result hears of it first; the thread of the task comes after."""
    order: list[str] = []
    store.gate.set()
    committer = Committer(cast(Store, store), lambda *_: order.append("told"))
    committer.settle(settlement(), lambda _: order.append("done"))
    committer.start()
    committer.close()
    assert order == ["told", "done"]


def test_an_announcement_that_breaks_stops_nothing(store: FakeStore, told: Told) -> None:
    """A commit counts although nobody could be told of it, and the next group is committed too."""
    store.gate.set()
    told.breaks = True
    with committing(store, told) as committer:
        assert settle(committer, settlement()).result(PATIENCE_SECONDS) is True
        assert settle(committer, settlement()).result(PATIENCE_SECONDS) is True
    assert len(store.groups) == 2


def test_a_listener_that_breaks_stops_nothing(store: FakeStore, told: Told) -> None:
    """Whoever settled may fail at what it hears; the others of its group hear all the same."""

    def breaks(_: bool) -> None:  # noqa: FBT001
        raise RuntimeError("does not listen")

    store.gate.set()
    committer = Committer(cast(Store, store), told)
    committer.settle(settlement(), breaks)
    other = settle(committer, settlement())
    committer.start()
    committer.close()
    assert other.result(PATIENCE_SECONDS) is True


def test_a_result_that_cannot_be_stored_fails_alone(store: FakeStore, told: Told) -> None:
    """One result that Postgres refuses ends its own job as failed; the others of its group are stored as they are."""
    store.refuses = lambda one: bool(one.choices) and one.choices[0].text == "bad"
    good = [settlement() for _ in range(6)]
    bad = settlement("bad")
    with committing(store, told) as committer:
        blocker = settle(committer, settlement())
        assert store.entered.wait(PATIENCE_SECONDS)
        futures = [settle(committer, one) for one in [*good[:3], bad, *good[3:]]]
        store.gate.set()
        assert all(future.result(PATIENCE_SECONDS) for future in [blocker, *futures])

    stored = {one.id: one for group in store.groups for one in group}
    assert [stored[one.id] for one in good] == good
    failed = stored[bad.id]
    assert (failed.outcome, failed.token, failed.choices) == (AttemptOutcome.FAILED, bad.token, ())
    assert failed.error is not None
    assert failed.error.code == "result_not_stored"


def test_what_cannot_be_stored_at_all_leaves_our_hands(store: FakeStore, told: Told) -> None:
    """If even the failure is refused, the job is let go, to be given back, and the committer lives on."""
    store.gate.set()
    hopeless = settlement()
    store.refuses = lambda one: one.id == hopeless.id
    with committing(store, told) as committer:
        assert settle(committer, hopeless).result(PATIENCE_SECONDS) is False
        assert settle(committer, settlement()).result(PATIENCE_SECONDS) is True
    assert hopeless.token in told.tokens
    assert hopeless.id not in told.done


def test_closing_commits_what_is_queued(store: FakeStore, told: Told) -> None:
    """`close` returns when everything that was handed in before is stored."""
    store.gate.set()
    committer = Committer(cast(Store, store), told)
    futures = [settle(committer, settlement()) for _ in range(20)]
    committer.start()
    committer.close()
    assert all(future.done() and future.result() for future in futures)


def test_closing_gives_up_when_postgres_is_away(store: FakeStore, told: Told) -> None:
    """A worker that stops during an outage does not wait for its end: its jobs are taken over."""
    store.outages = 1_000_000
    with committing(store, told) as committer:
        future = settle(committer, settlement())
        assert store.entered.wait(PATIENCE_SECONDS)
    assert future.result(PATIENCE_SECONDS) is False
    assert told.done == set()


def test_a_failure_keeps_its_error(store: FakeStore, told: Told) -> None:
    """Settlements pass through untouched."""
    store.gate.set()
    failed = Settlement(uuid4(), uuid4(), AttemptOutcome.FAILED, error=JobError(code="engine_error", message="oh"))
    with committing(store, told) as committer:
        assert settle(committer, failed).result(PATIENCE_SECONDS)
    assert store.groups == [[failed]]
