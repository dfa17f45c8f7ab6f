"""The echo engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.catalog import Catalog
from models.echo import EchoEngine
from models.protocol import Ended, Event, GenerationRequest, InvalidRequest, SamplingParams

Ask = Callable[..., GenerationRequest]
Finish = Callable[..., dict[str, Ended]]


def echo(**table: object) -> EchoEngine:
    return EchoEngine(Catalog.from_mapping({"echo": table}).get("echo"))


@given(st.text(min_size=1, max_size=30), st.integers(1, 200))
def test_the_answer_is_the_prompt_cut_at_max_tokens(text: str, max_tokens: int) -> None:
    """It says what was asked and stops; cut short, it says so and keeps whole characters."""
    engine, data = echo(), text.encode()
    engine.submit(GenerationRequest("a", tuple(data), SamplingParams(max_tokens)))
    choice = engine.step()[-1].choices[0]
    if max_tokens >= len(data):
        assert (choice.text, choice.finish_reason) == (text, "stop")
    else:
        assert choice.text == data[:max_tokens].decode(errors="ignore").rstrip("\ufffd")
        assert choice.finish_reason == "length"
    assert choice.token_ids == tuple(data[:max_tokens])


@pytest.mark.parametrize("seconds_per_token", [0.0, 1e-9])
def test_slow_and_fast_say_the_same(
    seconds_per_token: float, ask: Ask, finish: Finish, shown: Callable[..., str]
) -> None:
    """A token a step or all at once: the same text, deltas, ends and tokens."""
    engine, events = echo(seconds_per_token=seconds_per_token, slots=2), list[Event]()
    engine.submit(ask("whole", "héllo 好", stream=True))
    engine.submit(ask("cut", "h好", 3))
    engine.submit(ask("stopped", "one two three", stop=("three", "tw"), stream=True))
    engine.submit(ask("twice", "ab", 5, ignore_eos=True))
    engine.submit(ask("both", "xy", n=2))
    ended = finish(engine, events)
    assert {request_id: [choice.text for choice in end.choices] for request_id, end in ended.items()} == {
        "whole": ["héllo 好"],
        "cut": ["h"],
        "stopped": ["one "],
        "twice": ["ababa"],
        "both": ["xy", "xy"],
    }
    reasons = {request_id: end.choices[0].finish_reason for request_id, end in ended.items()}
    assert reasons == {"whole": "stop", "cut": "length", "stopped": "stop", "twice": "length", "both": "stop"}
    assert (shown(events, "whole"), shown(events, "stopped")) == ("héllo 好", "one ")
    assert ended["whole"].usage.completion_tokens == len("héllo 好".encode())


def test_a_whole_answer_takes_one_step_and_as_many_as_there_are_slots(ask: Ask, finish: Finish) -> None:
    """Without a time per token, one step ends as many requests as there are slots."""
    engine = echo(slots=64)
    for at in range(128):
        engine.submit(ask(str(at), "hello"))
    assert len(finish(engine)) == 128
    assert engine.health().steps == 2


def test_a_step_takes_the_time_of_a_token_however_many_rows(ask: Ask, finish: Finish) -> None:
    """With a time per token, each step takes it once, and its rows share it."""
    engine = echo(seconds_per_token=0.002)
    for at in range(10):
        engine.submit(ask(str(at), "hello"))
    ended = finish(engine)
    health = engine.health()
    assert health.steps == 5
    assert health.busy_seconds >= 5 * 0.002
    assert sum(end.timings.busy_seconds for end in ended.values()) == pytest.approx(health.busy_seconds)


def test_a_deadline_cuts_a_slow_answer(ask: Ask, finish: Finish) -> None:
    """A slow answer ends at its deadline with the part it has."""
    engine = echo(seconds_per_token=0.005)
    engine.submit(ask("a", "x" * 100_000, 100_000, deadline_seconds=0.05))
    ended = finish(engine)["a"]
    assert ended.outcome == "expired"
    assert ended.choices[0].text.startswith("x")
    assert len(ended.choices[0].text) < 100_000


def test_a_byte_is_a_token(ask: Ask) -> None:
    """An id above 255 is not in the vocabulary."""
    with pytest.raises(InvalidRequest, match="256"):
        echo().submit(ask("a", [256]))
