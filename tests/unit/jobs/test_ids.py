"""Identifiers: their order, their form, and that a line's never changes."""

from __future__ import annotations

import time
from uuid import RFC_4122, UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.ids import line_id, new_id

MAX_MILLISECONDS = 2**48 - 1
uuids = st.integers(0, 2**128 - 1).map(lambda value: UUID(int=value))
custom_ids = st.text(max_size=30)  # lone surrogates too


def milliseconds(some_id: UUID) -> int:
    return some_id.int >> 80


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time in milliseconds, to be set."""
    now = [0]
    monkeypatch.setattr(time, "time_ns", lambda: now[0] * 1_000_000)
    return now


def test_new_ids_are_version_7() -> None:
    """A new id is a UUIDv7 of the standard's variant."""
    some_id = new_id()
    assert (some_id.version, some_id.variant) == (7, RFC_4122)


def test_new_ids_carry_the_time() -> None:
    """An id begins with the milliseconds of its making."""
    before = time.time_ns() // 1_000_000
    some_id = new_id()
    assert before <= milliseconds(some_id) <= time.time_ns() // 1_000_000


def test_new_ids_sort_by_time(clock: list[int]) -> None:
    """Ids made in later milliseconds sort later, as values and as text."""
    made = []
    for clock[0] in (0, 1, 2**16, 2**32, MAX_MILLISECONDS):
        made.append(new_id())
    assert made == sorted(made)
    assert list(map(str, made)) == sorted(map(str, made))


def test_new_ids_differ_within_a_millisecond(clock: list[int]) -> None:
    """Ids made at the same moment differ."""
    assert len({new_id() for _ in range(10_000)}) == 10_000


@given(uuids, custom_ids)
def test_line_ids_are_version_8_of_the_batch_time(batch_id: UUID, custom_id: str) -> None:
    """A line's id is a UUIDv8 that sorts with its batch, and it is always the same one."""
    made = line_id(batch_id, custom_id)
    assert (made.version, made.variant) == (8, RFC_4122)
    assert milliseconds(made) == milliseconds(batch_id)
    assert made == line_id(UUID(str(batch_id)), custom_id)


@given(st.tuples(uuids, custom_ids), st.tuples(uuids, custom_ids))
def test_line_ids_tell_lines_apart(one: tuple[UUID, str], other: tuple[UUID, str]) -> None:
    """Different lines, or the same line of different batches, have different ids."""
    assert (line_id(*one) == line_id(*other)) == (one == other)


def test_line_id_never_changes() -> None:
    """The id of a line is part of the contract: a batch that was begun by an older version goes on."""
    batch_id = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
    assert line_id(batch_id, "request-1") == UUID("01890a5d-ac96-8867-aefb-39f3e94fc371")
