"""What the gateway tells Prometheus of the system while Postgres is away, and how often it asks."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.errors import StoreUnavailable
from producer.gateway.metrics import SystemCollector


class Leases:
    """No workers, or no answer."""

    def __init__(self, *, answers: bool) -> None:
        self.answers = answers
        self.asked = 0

    def list(self) -> list[Any]:
        self.asked += 1
        if not self.answers:
            raise StoreUnavailable("Postgres did not answer")
        return []


class Rows:
    """A database in which nothing happens."""

    def rows(self, statement: Any, fields: Any = None) -> list[Any]:
        return [SimpleNamespace(now=0)] if "now()" in str(statement) else []


def gateway_with(leases: Leases, *, store_answers: bool = True) -> Any:
    heard = SimpleNamespace(refused_messages=2)
    producer = SimpleNamespace(leases=leases, database=Rows(), refused_messages=1)
    return SimpleNamespace(
        producer=producer,
        follower=heard,
        admission=SimpleNamespace(store_answers=store_answers),
        webhooks=SimpleNamespace(attempts=Counter(delivered=4)),
    )


def values(collector: SystemCollector) -> dict[str, float]:
    return {
        "/".join((sample.name, *sample.labels.values())): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


@pytest.mark.parametrize("known", [True, False])
def test_without_postgres_its_figures_are_left_out(known: bool) -> None:  # noqa: FBT001
    """What is not known is not told as 0; if it is known to be away, nobody waits for it."""
    leases = Leases(answers=False)
    found = values(SystemCollector(gateway_with(leases, store_answers=not known)))
    webhooks = {f"headrace_webhook_attempts_total/{one}": 0 for one in ("failed", "given_up")}
    webhooks["headrace_webhook_attempts_total/delivered"] = 4
    assert found == {"headrace_store_up": 0, "headrace_refused_messages_total": 3} | webhooks
    assert leases.asked == (0 if known else 1)


def test_many_who_ask_at_once_cost_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a second the answer stands; after it there is another look."""
    now = 100.0
    monkeypatch.setattr("producer.gateway.metrics.time", SimpleNamespace(monotonic=lambda: now))
    leases = Leases(answers=True)
    monkeypatch.setattr("producer.gateway.metrics.Ends", lambda _: SimpleNamespace(look=list))
    collector = SystemCollector(gateway_with(leases))
    for _ in range(5):
        assert values(collector)["headrace_store_up"] == 1
    assert leases.asked == 1
    now += 1.0
    values(collector)
    assert leases.asked == 2
