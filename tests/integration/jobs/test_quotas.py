"""Quotas: tokens within a minute, reserved before a job is accepted, settled when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from jobs.database import Database
from jobs.errors import IdempotencyConflict, QuotaExceeded, RequestInvalid
from jobs.ids import new_id
from jobs.keys import ApiKey, Keys
from jobs.quotas import Quotas
from jobs.schema import Usage
from jobs.settings import Settings
from jobs.store import Reservation, Store
from kit.contract import MODEL, Tables, Worker, request_of, turn_of
from kit.threads import all_at_once
from producer.client import Producer


@pytest.fixture
def key(database: Database) -> ApiKey:
    """Ten tokens a minute."""
    return Keys(database).create("acme", quota_tokens_per_minute=10)[0]


@pytest.fixture
def quotas(database: Database) -> Quotas:
    return Quotas(database)


def used(tables: Tables, key: ApiKey) -> int:
    return int(tables.value("SELECT used_tokens FROM quotas WHERE key_id = %s", key.id))


def let_pass(tables: Tables, key: ApiKey, seconds: float) -> None:
    """As if the minute had begun so much earlier."""
    moved = "UPDATE quotas SET minute_began_at = minute_began_at - make_interval(secs => %s) WHERE key_id = %s"
    assert tables.execute(moved, seconds, key.id) == 1


def test_of_200_at_once_exactly_ten_pass(contract_url: str, database: Database, key: ApiKey, tables: Tables) -> None:
    """At a limit of ten tokens, of 200 requests for one token each that come at one moment, ten get one."""
    with closing(Database(contract_url, wait_seconds=60, pool_size=20)) as wide:

        def attempt() -> bool:
            try:
                Quotas(wide).reserve(key, 1)
            except QuotaExceeded:
                return False
            return True

        passed = all_at_once([attempt] * 200)
    assert passed.count(True) == 10
    assert used(tables, key) == 10


def test_it_says_when_to_come_back(quotas: Quotas, key: ApiKey, tables: Tables) -> None:
    """Between one second and sixty: when the minute is over."""
    quotas.reserve(key, 8)
    with pytest.raises(QuotaExceeded, match="10 that this key has a minute 2 are left") as first:
        quotas.reserve(key, 3)
    assert 58 <= first.value.retry_after_seconds <= 60
    let_pass(tables, key, 59.5)
    with pytest.raises(QuotaExceeded) as second:
        quotas.reserve(key, 3)
    assert second.value.retry_after_seconds == 1
    quotas.reserve(key, 2)


def test_a_minute_later_there_is_room_again(quotas: Quotas, key: ApiKey, tables: Tables) -> None:
    """The next minute begins with the first request after the last one was over."""
    quotas.reserve(key, 10)
    let_pass(tables, key, 60)
    quotas.reserve(key, 7)
    assert used(tables, key) == 7
    with pytest.raises(QuotaExceeded):
        quotas.reserve(key, 4)


def test_what_is_refused_counts_nothing(quotas: Quotas, key: ApiKey, tables: Tables) -> None:
    """Somebody who asks too often is not kept out by asking."""
    quotas.reserve(key, 10)
    for _ in range(5):
        with pytest.raises(QuotaExceeded):
            quotas.reserve(key, 1)
    assert used(tables, key) == 10


def test_keys_have_quotas_of_their_own(database: Database, quotas: Quotas, key: ApiKey) -> None:
    """One key's tokens are not another's, be it of the same tenant; without a limit there is nothing to reserve."""
    other, _ = Keys(database).create("acme", quota_tokens_per_minute=10)
    quotas.reserve(key, 10)
    quotas.reserve(other, 10)


def test_of_several_the_first_that_fit_are_reserved(quotas: Quotas, key: ApiKey, tables: Tables) -> None:
    """As many as there is room for, none of them in part; the rest in the next minute."""
    assert quotas.reserve_first(key.id, "acme", [4, 4, 1, 4]) == 3
    assert quotas.reserve_first(key.id, "acme", [2, 1]) == 0
    assert quotas.reserve_first(key.id, "acme", []) == 0
    assert used(tables, key) == 9
    let_pass(tables, key, 60)
    assert quotas.reserve_first(key.id, "acme", [4, 6, 1]) == 2
    assert used(tables, key) == 10


def test_of_several_at_once_no_more_than_fit_are_reserved(
    contract_url: str, database: Database, key: ApiKey, tables: Tables
) -> None:
    """Whoever comes at the same time sees what the others took."""
    with closing(Database(contract_url, wait_seconds=60, pool_size=10)) as wide:
        reserved = all_at_once([lambda: Quotas(wide).reserve_first(key.id, "acme", [1, 1, 1])] * 30)
    assert sum(reserved) == used(tables, key) == 10


# -- settled ----------------------------------------------------------------------------------------------------------


def reserved(quotas: Quotas, store: Store, key: ApiKey, tokens: int, **fields: Any) -> Any:
    quotas.reserve(key, tokens)
    return store.accept(new_id(), request_of(**fields), 3, key.tenant_id, Reservation(key.id, tokens)).id


def finish(store: Store, worker: Worker, job: Any) -> None:
    worker.run(job, usage=Usage(prompt_tokens=2, completion_tokens=1))


def cancel(store: Store, worker: Worker, job: Any) -> None:
    store.cancel(job, "acme")


def overdue(store: Store, worker: Worker, job: Any) -> None:
    database = store.database
    assert database.rows(_text("UPDATE jobs SET deadline_at = now() WHERE id = :id RETURNING id"), {"id": job})
    store.sweep([])


def lose_the_worker(store: Store, worker: Worker, job: Any) -> None:
    worker.claim(job)
    assert store.database.rows(
        _text("UPDATE jobs SET max_attempts = attempts WHERE id = :id RETURNING id"), {"id": job}
    )
    worker.leases.stop(worker.id)
    store.sweep([])


def _text(statement: str) -> Any:
    from sqlalchemy import text

    return text(statement)


@pytest.mark.parametrize(("end", "kept"), [(finish, 3), (cancel, 0), (overdue, 0), (lose_the_worker, 0)])
def test_what_a_job_did_not_use_goes_back(
    end: Callable[[Store, Worker, Any], None],
    kept: int,
    *,
    quotas: Quotas,
    store: Store,
    worker: Worker,
    key: ApiKey,
    tables: Tables,
) -> None:
    """However it ends: what counts is what it took."""
    end(store, worker, reserved(quotas, store, key, 10))
    assert used(tables, key) == kept


def test_several_that_end_together_are_settled_together(
    quotas: Quotas, store: Store, worker: Worker, key: ApiKey, tables: Tables
) -> None:
    """A group commit gives back the sum, not the last one's part."""
    from kit.contract import settlement

    claims = [worker.claim(reserved(quotas, store, key, 5)) for _ in range(2)]
    store.settle([settlement(claim, usage=Usage(prompt_tokens=1, completion_tokens=1)) for claim in claims])
    assert used(tables, key) == 4


def test_a_retry_keeps_its_reservation(
    quotas: Quotas, store: Store, worker: Worker, key: ApiKey, tables: Tables
) -> None:
    """It will run again, and take what it takes then."""
    job = reserved(quotas, store, key, 10)
    worker.run(job, "retried", retry_after_seconds=0.0)
    assert used(tables, key) == 10
    finish(store, worker, job)
    assert used(tables, key) == 3


def test_nothing_goes_back_into_a_later_minute(
    quotas: Quotas, store: Store, worker: Worker, key: ApiKey, tables: Tables
) -> None:
    """A job that was reserved in an earlier minute leaves this one's count alone."""
    job = reserved(quotas, store, key, 10)
    let_pass(tables, key, 60)
    quotas.reserve(key, 6)
    finish(store, worker, job)
    assert used(tables, key) == 6


def test_a_conversations_history_counts_too(
    quotas: Quotas, store: Store, worker: Worker, key: ApiKey, tables: Tables
) -> None:
    """What a turn took beyond its reservation, for the turns before it, is counted when it ends."""
    quotas.reserve(key, 5)
    job = store.accept(new_id(), turn_of("talk"), 3, "acme", Reservation(key.id, 5)).id
    worker.run(job, usage=Usage(prompt_tokens=7, completion_tokens=1))
    assert used(tables, key) == 8


# -- at the way in ----------------------------------------------------------------------------------------------------


@pytest.fixture
def producer(settings: Settings, contract_url: str, tables: Tables) -> Iterator[Producer]:
    with Producer(settings.model_copy(update={"database_url": contract_url})) as producer:
        yield producer


def test_a_submit_reserves_prompt_and_answers(producer: Producer, database: Database, tables: Tables) -> None:
    """The prompt's tokens, and as many as each answer may have; without a limit nothing is noted."""
    key, _ = Keys(database).create("acme", quota_tokens_per_minute=1000)
    job = producer.for_key(key).submit(model=MODEL, prompt=[1, 2, 3], max_tokens=100, n=4)
    assert used(tables, key) == 403
    assert (tables.job(job.id)["key_id"], tables.job(job.id)["reserved_tokens"]) == (key.id, 403)
    free, _ = Keys(database).create("acme")
    assert tables.job(producer.for_key(free).submit(model=MODEL, prompt="hello").id)["key_id"] is None


def test_beyond_the_quota_there_is_no_job(producer: Producer, key: ApiKey) -> None:
    """The second one is refused before it has a row."""
    acme = producer.for_key(key)
    acme.submit(model=MODEL, prompt=[1], max_tokens=8)
    with pytest.raises(QuotaExceeded):
        acme.submit(model=MODEL, prompt=[1], max_tokens=1)
    assert len(acme.list()) == 1


def test_a_request_above_the_whole_quota_is_invalid(producer: Producer, key: ApiKey, tables: Tables) -> None:
    """To wait would not help, so it is not told to."""
    with pytest.raises(RequestInvalid) as refused:
        producer.for_key(key).submit(model=MODEL, prompt=[1], max_tokens=10)
    assert (refused.value.field, refused.value.code) == ("max_tokens", "tokens_above_quota")
    assert used(tables, key) == 0


def test_a_repeated_submit_is_counted_once(producer: Producer, key: ApiKey, tables: Tables) -> None:
    """The same id or key is the same job, also when the quota is used up by it."""
    acme = producer.for_key(key)
    for asked in ({"max_tokens": 2}, {"max_tokens": 4}):
        request = request_of(prompt=[1], idempotency_key=str(asked), **asked)
        jobs = {acme.submit(request).id for _ in range(3)}
        assert len(jobs) == 1
    assert used(tables, key) == 3 + 5


def test_a_conflict_is_not_counted(producer: Producer, key: ApiKey, tables: Tables) -> None:
    """What is refused for its idempotency key gives its reservation back."""
    acme = producer.for_key(key)
    acme.submit(request_of(prompt=[1], max_tokens=2, idempotency_key="k"))
    with pytest.raises(IdempotencyConflict):
        acme.submit(request_of(prompt=[2], max_tokens=2, idempotency_key="k"))
    assert used(tables, key) == 3
