"""Turns: blocked until the turn before has ended, released in the transaction that ends it, never lost between."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from uuid import UUID

import pytest

from jobs.schema import Choice
from jobs.states import FINAL, State
from jobs.store import Store, Waiting, _settle
from kit.contract import WAITING_FOR_A_LOCK, Tables, Worker, accept, request_of, settlement, turn_of
from kit.threads import all_at_once
from kit.waiting import wait_until


def answer(text: str) -> tuple[Choice, ...]:
    return (Choice(index=0, text=text, finish_reason="stop"),)


def accept_turns(store: Store, turns: int, conversation: str = "c") -> list[UUID]:
    return [accept(store, turn_of(conversation, f"question {turn}")) for turn in range(1, turns + 1)]


def states(tables: Tables, turns: list[UUID]) -> list[State]:
    return [tables.state(turn) for turn in turns]


QUEUED, BLOCKED, RUNNING, SUCCEEDED, CANCELLED = (
    State.QUEUED,
    State.BLOCKED,
    State.RUNNING,
    State.SUCCEEDED,
    State.CANCELLED,
)


def test_later_turns_are_blocked(store: Store, worker: Worker, tables: Tables) -> None:
    """The first turn may run; each after it waits for the one before, and no worker can take it."""
    turns = accept_turns(store, 3)
    assert states(tables, turns) == [QUEUED, BLOCKED, BLOCKED]
    assert [store.get(turn).turn for turn in turns] == [1, 2, 3]
    assert worker.try_claim(turns[1]) is None


def test_a_turn_after_the_end_of_the_last_is_queued(store: Store, worker: Worker) -> None:
    """A turn with nothing to wait for is not blocked."""
    worker.run(accept(store, turn_of("c")))
    second = store.get(accept(store, turn_of("c")))
    assert (second.state, second.turn) == (QUEUED, 2)


@pytest.mark.parametrize("outcome", sorted(FINAL))
def test_the_end_of_a_turn_releases_the_next(outcome: str, store: Store, worker: Worker, tables: Tables) -> None:
    """However a turn ends, the next one is released, by name, and the one after that is not."""
    turns = accept_turns(store, 3)
    claim = worker.claim(turns[0])
    settled = worker.settle(claim, outcome)
    assert settled.released == (Waiting(turns[1], "echo", 5),)
    assert states(tables, turns) == [State(outcome), QUEUED, BLOCKED]


def test_release_is_part_of_the_ending_transaction(
    store: Store, worker: Worker, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the transaction that ends a turn is undone, so is the release: there is no moment between the two."""
    turns = accept_turns(store, 2)
    claim = worker.claim(turns[0])

    class Undone(Exception):
        """The transaction is rolled back at its very end."""

    honest = store.database.run

    def run(work: object, **options: bool) -> object:
        def undone(connection: object) -> object:
            work(connection)  # type: ignore[operator]
            raise Undone

        return honest(undone, **options)

    with monkeypatch.context() as patched:
        patched.setattr(store.database, "run", run)
        with pytest.raises(Undone):
            store.settle([settlement(claim)])
    assert states(tables, turns) == [RUNNING, BLOCKED]
    assert tables.count("ledger") == 0
    worker.settle(claim)
    assert states(tables, turns) == [SUCCEEDED, QUEUED]


def test_a_released_turn_waits_from_its_release(store: Store, worker: Worker, tables: Tables) -> None:
    """The time a turn was blocked is no time in the queue."""
    turns = accept_turns(store, 2)
    for turn in turns:
        tables.move_back(turn, "run_after", 100)
    worker.run(turns[0])
    assert worker.claim(turns[1]).queue_seconds < 50


@pytest.mark.parametrize("outcome", ["retried", "released"])
def test_a_requeued_turn_releases_nothing(outcome: str, store: Store, worker: Worker, tables: Tables) -> None:
    """A turn that goes back to the queue has not ended."""
    turns = accept_turns(store, 2)
    assert worker.settle(worker.claim(turns[0]), outcome).released == ()
    assert states(tables, turns) == [QUEUED, BLOCKED]


def test_turns_run_in_order(store: Store, worker: Worker, tables: Tables) -> None:
    """Turn by turn, and never two at a time."""
    turns = accept_turns(store, 5)
    for at, turn in enumerate(turns):
        assert [worker.try_claim(later) for later in turns[at + 1 :]] == [None] * (len(turns) - at - 1)
        worker.run(turn)
    assert states(tables, turns) == [SUCCEEDED] * 5
    assert [store.get(turn).turn for turn in turns] == [1, 2, 3, 4, 5]


def test_conversations_do_not_wait_for_each_other(store: Store, worker: Worker, tables: Tables) -> None:
    """Other conversations, the same one of another tenant, and jobs without one go their own ways."""
    blocked = accept_turns(store, 2)
    others = [
        accept(store, turn_of("d")),
        accept(store, turn_of("c"), tenant="other"),
        accept(store, request_of()),
    ]
    assert states(tables, others) == [QUEUED] * 3
    worker.run(others[1])
    assert states(tables, blocked) == [QUEUED, BLOCKED]


def test_one_group_releases_many_conversations(store: Store, worker: Worker, tables: Tables) -> None:
    """A group commit that ends turns of several conversations releases the next turn of each."""
    conversations = [accept_turns(store, 2, name) for name in ("b", "a", "c")]
    claims = [worker.claim(turns[0]) for turns in conversations]
    settled = store.settle([settlement(claim) for claim in claims])
    assert {waiting.id for waiting in settled.released} == {turns[1] for turns in conversations}


# == history ====================================================================================================


def test_history_holds_succeeded_turns_only(store: Store, worker: Worker) -> None:
    """A turn sees, in order, the messages and first answers of the turns before it that succeeded."""
    for turn, outcome in enumerate(["succeeded", "failed", "succeeded", "cancelled", "expired"], start=1):
        job_id = accept(store, turn_of("c", f"question {turn}"))
        worker.run(job_id, outcome, choices=answer(f"answer {turn}"))
    worker.run(accept(store, turn_of("c", "question 6")), choices=answer("answer 6"))
    assert store.history("local", "c", before_turn=6) == [
        {"role": "user", "content": "question 1"},
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "question 3"},
        {"role": "assistant", "content": "answer 3"},
    ]


def test_history_keeps_all_messages_of_a_turn(store: Store, worker: Worker) -> None:
    """A turn may begin with a system message; it stays where it was, and every character with it."""
    messages = [{"role": "system", "content": "be \u0000 brief"}, {"role": "user", "content": "\U0001f600?"}]
    worker.run(accept(store, turn_of("c", messages=messages)), choices=answer("yes \u0000"))
    assert store.history("local", "c", 2) == [*messages, {"role": "assistant", "content": "yes \u0000"}]


def test_history_of_another_tenant(store: Store, worker: Worker) -> None:
    """The conversation of the same name of another tenant is another conversation."""
    worker.run(accept(store, turn_of("c"), tenant="one"))
    assert store.history("two", "c", 99) == []
    assert len(store.history("one", "c", 99)) == 2


# == cancel, sweep ==============================================================================================


def test_cancel_of_the_first_turn_releases_the_next(store: Store, tables: Tables) -> None:
    """The owner who cancels a queued turn learns which turn may run now."""
    turns = accept_turns(store, 3)
    assert store.cancel(turns[0]) == (CANCELLED, (Waiting(turns[1], "echo", 5),))
    assert states(tables, turns) == [CANCELLED, QUEUED, BLOCKED]


def test_cancel_of_a_blocked_turn_lets_nobody_overtake(store: Store, worker: Worker, tables: Tables) -> None:
    """With the middle turn cancelled, the last still waits for the first, and is released by its end."""
    turns = accept_turns(store, 3)
    claim = worker.claim(turns[0])
    assert store.cancel(turns[1]) == (CANCELLED, ())
    assert states(tables, turns) == [RUNNING, CANCELLED, BLOCKED]
    assert worker.settle(claim).released == (Waiting(turns[2], "echo", 5),)
    assert states(tables, turns) == [SUCCEEDED, CANCELLED, QUEUED]


def test_a_new_turn_waits_for_any_before_it(store: Store, worker: Worker, tables: Tables) -> None:
    """The turn just before may have been cancelled: a new one still waits for the one that runs."""
    turns = accept_turns(store, 2)
    worker.claim(turns[0])
    store.cancel(turns[1])
    third = accept(store, turn_of("c"))
    assert tables.state(third) is BLOCKED


def test_expiry_of_turns(store: Store, tables: Tables) -> None:
    """Overdue turns end, blocked ones too, and what waited for them is released by the sweep that ended them."""
    turns = [accept(store, turn_of("c", deadline_seconds=1)) for _ in range(2)]
    turns.append(accept(store, turn_of("c")))
    for turn in turns[:2]:
        tables.move_back(turn, "deadline_at", 2)
    swept = store.sweep([])
    assert swept is not None
    assert set(swept.ended) == set(turns[:2])
    assert swept.to_publish == (Waiting(turns[2], "echo", 5),)
    assert states(tables, turns) == [State.EXPIRED, State.EXPIRED, QUEUED]


def test_a_dead_workers_last_attempt_releases_the_next_turn(store: Store, worker: Worker, tables: Tables) -> None:
    """A turn that fails because its worker died does not hold up the conversation."""
    first = accept(store, turn_of("c"), max_attempts=1)
    second = accept(store, turn_of("c"))
    worker.claim(first)
    tables.end_lease(worker.id)
    swept = store.sweep([])
    assert swept is not None
    assert [waiting.id for waiting in swept.to_publish] == [second]
    assert states(tables, [first, second]) == [State.FAILED, QUEUED]


# == at once ====================================================================================================


def test_submits_at_once_get_consecutive_turns(store: Store, tables: Tables) -> None:
    """Twenty turns from eight threads are numbered from 1 to 20, and only the first may run."""
    shares = [range(at, 20, 8) for at in range(8)]
    all_at_once(
        [partial(lambda share: [accept(store, turn_of("c", f"{n}")) for n in share], share) for share in shares]
    )
    rows = tables.rows("SELECT turn, state FROM jobs ORDER BY turn")
    assert [row["turn"] for row in rows] == list(range(1, 21))
    assert [row["state"] for row in rows] == ["queued"] + ["blocked"] * 19
    assert tables.value("SELECT turns FROM conversations") == 20


ROUNDS = 10
PAIRS = 8


def test_accept_against_finish_leaves_nobody_behind(store: Store, worker: Worker, tables: Tables) -> None:
    """While turn 1 ends, turn 2 is submitted: whoever comes first, turn 2 may run in the end."""
    for number in range(ROUNDS):
        conversations = [f"{number}-{pair}" for pair in range(PAIRS)]
        claims = [worker.claim(accept(store, turn_of(name))) for name in conversations]
        finishes = [partial(worker.settle, claim) for claim in claims]
        submits = [partial(accept, store, turn_of(name)) for name in conversations]
        all_at_once([call for pair in zip(finishes, submits, strict=True) for call in pair])
    assert tables.rows("SELECT conversation FROM jobs WHERE state = 'blocked'") == []
    assert tables.value("SELECT count(*) FROM jobs WHERE state = 'queued' AND turn = 2") == ROUNDS * PAIRS


def test_a_submit_that_waits_for_a_finish_sees_it(store: Store, worker: Worker, tables: Tables) -> None:
    """A submit that comes while the turn before is being ended waits for that, and then is not blocked by it."""
    claim = worker.claim(accept(store, turn_of("c")))
    with ThreadPoolExecutor(1) as pool:
        with store.database._durable.begin() as ending:
            _settle(ending, [settlement(claim)])
            submitted = pool.submit(accept, store, turn_of("c"))
            wait_until(lambda: tables.value(WAITING_FOR_A_LOCK), 20, "the submit waits for the end of the turn before")
        second = submitted.result()
    assert (store.get(second).state, store.get(second).turn) == (QUEUED, 2)


def test_cancel_against_finish_leaves_nobody_behind(
    store: Store, worker: Worker, tables: Tables, transactions: list[object]
) -> None:
    """While turn 1 ends, turn 2 is cancelled: turn 3 may run in the end, and no deadlock had to be broken."""
    for number in range(5):
        conversations = [f"{number}-{pair}" for pair in range(PAIRS)]
        turns = [accept_turns(store, 3, name) for name in conversations]
        claims = [worker.claim(first) for first, _, _ in turns]
        finishes = [partial(worker.settle, claim) for claim in claims]
        cancels = [partial(store.cancel, second) for _, second, _ in turns]
        transactions.clear()
        all_at_once([call for pair in zip(finishes, cancels, strict=True) for call in pair])
        assert len(transactions) == 3 * PAIRS  # a turn's end takes two; not one was tried again
        assert [tables.state(third) for _, _, third in turns] == [QUEUED] * PAIRS
        assert [tables.state(first) for first, _, _ in turns] == [SUCCEEDED] * PAIRS
