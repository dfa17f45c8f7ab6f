"""When a worker counts as not consuming, and what it does about it, by a clock of the test's own."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from workers.proof import PATIENCE_SECONDS, ConsumptionProof

PERIOD_SECONDS = 2.5
THREADS = 2


class Broker:
    """Takes messages, and delivers them or not; time passes only here."""

    def __init__(self) -> None:
        self.now = 0.0
        self.takes: bool | None = True  # None: the worker has nothing sent
        self.delivers = True
        self.calls: list[str] = []
        self.proof = ConsumptionProof(
            send=self._send,
            hang_up=lambda: self.calls.append("hang up"),
            give_up=lambda: self.calls.append("give up"),
            threads=THREADS,
            clock=lambda: self.now,
        )

    def _send(self) -> bool | None:
        if self.takes and self.delivers:
            with self.proof.task():
                pass
        return self.takes

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.proof.run_once()
            self.now += PERIOD_SECONDS


@pytest.fixture
def broker() -> Broker:
    """A broker that works."""
    return Broker()


def test_a_worker_that_gets_its_messages_is_left_alone(broker: Broker) -> None:
    """Each message that comes back is a proof."""
    broker.run(60)
    assert broker.calls == []
    assert broker.proof.consumes


def test_without_a_proof_it_dials_again_and_then_starts_again(broker: Broker) -> None:
    """First the gentle way, once, under which jobs run on; if it does not help, the other."""
    broker.delivers = False
    broker.run(PATIENCE_SECONDS + PERIOD_SECONDS)
    assert broker.calls == []
    broker.run(PERIOD_SECONDS)
    assert not broker.proof.consumes
    assert broker.calls == ["hang up"]
    broker.run(PATIENCE_SECONDS)
    assert broker.calls == ["hang up", "give up"]


def test_any_task_that_arrives_is_a_proof(broker: Broker) -> None:
    """Work that comes in says as much as a message of its own; what was missed before counts no more."""
    broker.delivers = False
    broker.run(PATIENCE_SECONDS + PERIOD_SECONDS)
    with broker.proof.task():
        assert broker.proof.consumes
    broker.run(PATIENCE_SECONDS)
    assert broker.calls == []


def test_a_worker_with_every_thread_busy_for_a_minute_is_left_alone(broker: Broker) -> None:
    """It fetches from no queue, and rightly so; the wait begins when a thread is free again."""
    broker.delivers = False
    with ExitStack() as tasks:
        for _ in range(THREADS):
            tasks.enter_context(broker.proof.task())
        broker.run(60)
        assert broker.calls == []
        assert broker.proof.consumes
    broker.run(PATIENCE_SECONDS)
    assert broker.calls == []
    broker.run(2 * PERIOD_SECONDS)
    assert broker.calls == ["hang up"]


def test_while_the_broker_takes_nothing_there_is_nothing_to_prove(broker: Broker) -> None:
    """A broker that is away is not the consumer's fault, also if it goes in the middle of a wait."""
    broker.delivers = False
    broker.run(PATIENCE_SECONDS)
    broker.takes = False
    broker.run(60)
    assert broker.calls == []
    assert not broker.proof.consumes
    broker.takes = broker.delivers = True
    broker.run(PERIOD_SECONDS)
    assert broker.proof.consumes


def test_a_broker_that_takes_nothing_is_seen_at_the_next_message(broker: Broker) -> None:
    """Nobody waits for the last proof to grow old; a worker that wants no message has been refused none."""
    broker.run(PERIOD_SECONDS)
    broker.takes = None
    broker.run(PERIOD_SECONDS)
    assert broker.proof.consumes
    broker.takes = False
    broker.run(PERIOD_SECONDS)
    assert not broker.proof.consumes


def test_a_task_that_ends_beside_a_free_thread_proves_nothing(broker: Broker) -> None:
    """Only with every thread busy could nothing arrive meanwhile."""
    broker.delivers = False
    with broker.proof.task():
        broker.run(2 * PATIENCE_SECONDS)
    assert not broker.proof.consumes
