"""What a worker holds: nothing it may have claimed is ever missing from its list."""

from __future__ import annotations

import threading
from uuid import UUID, uuid4

from jobs.ids import new_id
from jobs.schema import JobRequest
from jobs.states import Lane
from jobs.store import Claim
from workers.host import Hands

PATIENCE_SECONDS = 10.0


def claim(token: UUID) -> Claim:
    """A claim under this token."""
    return Claim(
        id=new_id(),
        token=token,
        tenant_id="local",
        model="echo",
        lane=Lane.INTERACTIVE,
        priority=5,
        attempt=1,
        max_attempts=3,
        queue_seconds=0.0,
        seconds_left=None,
        conversation=None,
        turn=None,
        metered=False,
        request=JobRequest(model="echo", prompt="hello"),
    )


def test_a_token_is_held_from_before_its_claim() -> None:
    """A heartbeat between the claim and its answer must find the token, though no job is known yet."""
    hands = Hands()
    tokens = hands.reach(3)
    assert len(set(tokens)) == 3
    assert hands.tokens() == tokens
    assert hands.all() == []


def test_tokens_that_claimed_nothing_are_dropped() -> None:
    """Of the tokens reached with, those that took a job stay, with their job."""
    hands = Hands()
    tokens = hands.reach(3)
    held = hands.take(tokens, [claim(tokens[1])])
    assert hands.tokens() == [tokens[1]]
    assert hands.all() == held
    assert held[0].request_id == f"{held[0].claim.id}/{tokens[1]}"


def test_a_claim_that_failed_leaves_nothing() -> None:
    """When the claim's answer was lost, its tokens are let go: the heartbeat gives such rows back."""
    hands = Hands()
    hands.take(hands.reach(2), [])
    assert hands.tokens() == []


def test_what_is_settled_is_dropped_once() -> None:
    """Dropping twice, or what was never held, is harmless."""
    hands = Hands()
    tokens = hands.reach(2)
    hands.take(tokens, [claim(token) for token in tokens])
    hands.drop([tokens[0]])
    hands.drop([tokens[0], uuid4()])
    assert hands.tokens() == [tokens[1]]


def test_the_first_reason_to_stop_stands() -> None:
    """A job being cancelled is not made a released one by a drain: it is marked once, and stopped once."""
    hands = Hands()
    first, second = hands.take(tokens := hands.reach(2), [claim(token) for token in tokens])
    assert hands.mark([first], "cancel") == [first]
    assert hands.mark([first, second], "release") == [second]
    assert hands.mark([first, second], "fence") == []
    assert (first.stop, second.stop) == ("cancel", "release")


def test_waiting_for_empty_hands_ends_with_the_last_job() -> None:
    """Both what is held and what is reached for is waited for."""
    hands = Hands()
    reached, held = hands.reach(), hands.reach()
    hands.take(held, [claim(held[0])])
    emptied = threading.Event()

    def wait() -> None:
        if hands.wait_empty(PATIENCE_SECONDS):
            emptied.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    hands.drop(held)
    assert hands.wait_empty(0.0) is False
    hands.take(reached, [])
    assert emptied.wait(PATIENCE_SECONDS)
    waiting.join()
    assert hands.wait_empty(0.0) is True
