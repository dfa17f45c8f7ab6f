"""What a producer knows of ends without looking: from when it listens, and only of what it was told to expect."""

from __future__ import annotations

from typing import cast
from uuid import uuid4

import pytest

import producer.client
from jobs.signals import Signals
from producer.client import _Ears


@pytest.fixture
def ears() -> _Ears:
    return _Ears(cast(Signals, None))


def test_nothing_is_expected_before_anybody_listens(ears: _Ears) -> None:
    """An end would not be heard: whoever waits has to look."""
    job_id = uuid4()
    ears.expect(job_id)
    assert not ears.expects(job_id)


def test_an_end_that_was_heard_is_not_expected_any_more(ears: _Ears) -> None:
    """Also if nobody waited yet when it was heard; other jobs go on being expected."""
    ears._subscribed.set()
    ended, other = uuid4(), uuid4()
    ears.expect(ended)
    ears.expect(other)
    ears._wake(ended)
    assert (ears.expects(ended), ears.expects(other)) == (False, True)


@pytest.mark.parametrize("change", ["set", "clear"])
def test_a_gap_in_listening_makes_everything_uncertain(ears: _Ears, change: str) -> None:
    """What ended while the subscription was lost, or between it and the next one, was not heard."""
    ears._subscribed.set()
    job_id = uuid4()
    ears.expect(job_id)
    getattr(ears._subscribed, change)()
    assert not ears.expects(job_id)


def test_only_so_many_are_expected(ears: _Ears, monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer that never waits keeps no more of its jobs in mind than the newest."""
    monkeypatch.setattr(producer.client, "_EXPECTED", 2)
    ears._subscribed.set()
    jobs = [uuid4() for _ in range(3)]
    for job_id in jobs:
        ears.expect(job_id)
    assert [ears.expects(job_id) for job_id in jobs] == [False, True, True]
