"""The pieces of a streamed answer: each once, in order, whatever was lost on the way."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.schema import Choice, Job, TokenLogprob
from jobs.streams import Piece
from producer.telling import Diverged, Teller, Told

CREATED: Any = "2026-01-01T00:00:00Z"


def pieces(*texts: str, attempt: str = "a", choice: int = 0) -> list[Piece]:
    return [Piece(attempt, number, choice, text, 1) for number, text in enumerate(texts)]


def job(*choices: Choice) -> Job:
    fields: dict[str, Any] = {"lane": "interactive", "priority": 5, "attempts": 1, "max_attempts": 3}
    return Job(id=uuid4(), tenant_id="t", state="succeeded", model="m", created_at=CREATED, choices=choices, **fields)


def choice(*texts: str, cut: bool = True, index: int = 0) -> Choice:
    cuts = tuple((len(text), 1) for text in texts) if cut else ()
    return Choice(index=index, text="".join(texts), finish_reason="stop", pieces=cuts)


def texts(told: list[Told]) -> list[str]:
    return [one.text for one in told]


def test_pieces_are_passed_on() -> None:
    """As they come; nothing is left at the end."""
    teller = Teller()
    assert texts(list(teller.take(pieces("Hel", "lo")))) == ["Hel", "lo"]
    assert list(teller.rest(job(choice("Hel", "lo")))) == []


@given(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_what_is_lost_is_told_from_the_result(said: list[str], first: int, lost: int) -> None:
    """Cut where the stream was cut: whichever pieces come through, the sequence is that of all of them."""
    teller = Teller()
    told = list(teller.take(pieces(*said)[:first]))
    told += list(teller.take(pieces(*said)[first + lost :]))
    told += list(teller.rest(job(choice(*said))))
    assert texts(told) == said


@given(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8), st.integers(0, 8), st.integers(1, 5))
def test_another_attempt_goes_on_where_the_first_was_cut_off(said: list[str], first: int, size: int) -> None:
    """What was told is not told again, however the second attempt cuts the same text."""
    whole = "".join(said)
    again = [whole[at : at + size] for at in range(0, len(whole), size)]
    teller = Teller()
    told = list(teller.take(pieces(*said)[:first]))
    told += list(teller.take(pieces(*again, attempt="b")))
    told += list(teller.rest(job(choice(*again))))
    assert "".join(texts(told)) == whole


def test_another_text_cannot_be_told() -> None:
    """Part of the first one is out already."""
    teller = Teller()
    assert texts(list(teller.take(pieces("Hel")))) == ["Hel"]
    with pytest.raises(Diverged):
        list(teller.take(pieces("Bye", attempt="b")))
    late = Teller()
    assert texts(list(late.take(pieces("Hel")))) == ["Hel"]
    with pytest.raises(Diverged):
        list(late.rest(job(choice("Bye"))))


def test_choices_keep_apart() -> None:
    """Each has its own place in its own text."""
    teller = Teller()
    mixed = [Piece("a", 0, 1, "one", 1), Piece("a", 1, 0, "zero", 1)]
    assert [(told.choice, told.text) for told in teller.take(mixed)] == [(1, "one"), (0, "zero")]
    rest = teller.rest(job(choice("zero", "!"), choice("one", "?", index=1)))
    assert [(told.choice, told.text) for told in rest] == [(0, "!"), (1, "?")]


def test_an_answer_that_was_not_streamed_is_one_piece() -> None:
    """There are no cuts to follow."""
    assert texts(list(Teller().rest(job(choice("Hel", "lo", cut=False))))) == ["Hello"]
    assert list(Teller().rest(job(choice("")))) == []


def test_log_probabilities_without_text_come_at_the_end() -> None:
    """The token that ended the answer has no text, but was asked for."""
    tokens = tuple(TokenLogprob(token=token, id=number, logprob=-1.0) for number, token in enumerate(["Hi", "<end>"]))
    teller = Teller()
    told = list(teller.take([Piece("a", 0, 0, "Hi", 1, tokens[:1])]))
    ended = Choice(index=0, text="Hi", finish_reason="stop", logprobs=tokens, pieces=((2, 1),))
    told += list(teller.rest(job(ended)))
    assert [(one.text, one.logprobs) for one in told] == [("Hi", tokens[:1]), ("", tokens[1:])]
