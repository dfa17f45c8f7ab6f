"""What every engine does around its forward pass: order, ends, accounts. Driven with a pass that tests script."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from models import base as module
from models.base import BaseEngine
from models.catalog import ModelSpec
from models.protocol import FIRST_STEPS, Ended, Event, Failure, GenerationRequest, InvalidRequest, Started
from models.rows import Advance, Row
from models.scheduler import Plan, SlotScheduler

Ask = Callable[..., GenerationRequest]
Finish = Callable[..., dict[str, Ended]]


class Scripted(BaseEngine):
    """Gives each row one "x" a step; `fault` is called with the rows first, and may raise or return failures."""

    def __init__(self, slots: int = 4) -> None:
        spec = ModelSpec(name="scripted", engine="echo", slots=slots)
        decode = lambda ids: bytes(ids).decode(errors="replace")  # noqa: E731
        super().__init__(
            spec, SlotScheduler(slots), device="cpu", vocab_tokens=256, context_tokens=1_000, decode=decode
        )
        self.fault: Callable[[Sequence[Row]], dict[Row, Failure]] = lambda rows: {}
        self.recovered = 0
        self.now_running: list[str] = []

    def _forward(self, plan: Plan) -> list[Advance]:
        rows = [work.row for work in plan.works]
        self.now_running = [row.flight.request.id for row in rows]
        failures = self.fault(rows)
        return [Advance(row, 1, b"x", failure=failures.get(row)) for row in rows]

    def _recover(self) -> None:
        self.recovered += 1


def step(engine: BaseEngine) -> dict[str, Ended]:
    return {event.id: event for event in engine.step() if isinstance(event, Ended)}


def test_intake_refuses_without_touching_anything(ask: Ask) -> None:
    """A bad request and a duplicate id are refused, and the engine stays idle or goes on."""
    engine = Scripted()
    with pytest.raises(InvalidRequest, match="prompt"):
        engine.submit(ask("a", ""))
    assert not engine.has_work()
    engine.submit(ask("a", "p"))
    with pytest.raises(InvalidRequest, match="already in the engine") as refused:
        engine.submit(ask("a", "p"))
    assert refused.value.field == "id"
    assert engine.health().waiting == 1


def test_an_id_may_come_again_once_it_ended(ask: Ask, finish: Finish) -> None:
    """Only open requests hold their id."""
    engine = Scripted()
    for _ in range(2):
        engine.submit(ask("a", "p", 2))
        assert finish(engine)["a"].outcome == "succeeded"


def test_priority_first_then_arrival(ask: Ask) -> None:
    """Waiting rows join by priority, 0 first, and by arrival within one."""
    engine = Scripted(slots=3)
    for request_id, priority in (("a", 5), ("b", 9), ("c", 5), ("d", 0)):
        engine.submit(ask(request_id, "p", priority=priority))
    engine.step()
    assert engine.now_running == ["d", "a", "c"]


def test_choices_are_rows_and_may_outnumber_the_slots(ask: Ask, finish: Finish) -> None:
    """A request with more choices than slots is computed in turns, and ends once with all of them."""
    engine, events = Scripted(slots=2), list[Event]()
    engine.submit(ask("a", "pp", 3, n=5, temperature=1.0))
    assert engine.health().waiting == 5
    ended = finish(engine, events)["a"]
    assert [choice.text for choice in ended.choices] == ["xxx"] * 5
    assert (ended.usage.prompt_tokens, ended.usage.completion_tokens) == (2, 15)
    assert events.count(Started("a")) == 1


def test_cancel_ends_with_the_text_so_far(ask: Ask) -> None:
    """A running request that is cancelled ends in the next step with what it has; an unknown id is ignored."""
    engine = Scripted()
    engine.submit(ask("a", "p"))
    engine.step()
    engine.step()
    engine.cancel("a")
    engine.cancel("nobody")
    ended = step(engine)["a"]
    assert (ended.outcome, ended.choices[0].text, ended.choices[0].finish_reason) == ("cancelled", "xx", "cancelled")
    assert ended.usage.completion_tokens == 2
    assert not engine.has_work()


def test_a_cancel_does_not_outlive_its_request(ask: Ask, finish: Finish) -> None:
    """A request that takes a cancelled one's id after a drain is another request."""
    engine = Scripted()
    engine.submit(ask("a", "p", 1))
    engine.cancel("a")
    engine.drain()
    engine.cancel("a")
    engine.submit(ask("a", "p", 1))
    assert finish(engine)["a"].outcome == "succeeded"


def test_a_waiting_request_that_is_cancelled_costs_nothing(ask: Ask) -> None:
    """It never joins a step, and its record is of zeros."""
    engine = Scripted(slots=1)
    engine.submit(ask("a", "p"))
    engine.submit(ask("b", "p"))
    engine.step()
    engine.cancel("b")
    ended = step(engine)["b"]
    assert (ended.outcome, ended.choices, ended.usage.prompt_tokens, ended.timings.busy_seconds) == (
        "cancelled",
        (),
        0,
        0.0,
    )
    assert ended.timings.queue_seconds > 0
    assert engine.health().waiting == 0


def test_a_deadline_ends_running_and_waiting_requests(ask: Ask) -> None:
    """Past its deadline, counted from intake, a request ends as expired with what it has."""
    engine = Scripted(slots=1)
    engine.submit(ask("runs", "p", deadline_seconds=1_000))
    engine.submit(ask("waits", "p", deadline_seconds=1_000))
    engine.submit(ask("later", "p", deadline_seconds=2_000))
    engine.step()
    for flight in engine._flights.values():
        flight.deadline_at -= 1_000
    engine._deadlines = [(flight.deadline_at, order, flight) for _, order, flight in engine._deadlines]
    ended = step(engine)
    assert {request_id: end.outcome for request_id, end in ended.items()} == {"runs": "expired", "waits": "expired"}
    assert ended["runs"].choices[0].finish_reason == "deadline"
    assert engine.now_running == ["later"]


def test_drain_releases_only_what_no_step_has_touched(ask: Ask, finish: Finish) -> None:
    """Waiting requests end as released at once, those that run end on their own."""
    engine = Scripted(slots=1)
    for request_id in "abc":
        engine.submit(ask(request_id, "p", 3))
    engine.step()
    released = engine.drain()
    assert {event.id: event.outcome for event in released} == {"b": "released", "c": "released"}
    assert {request_id: end.outcome for request_id, end in finish(engine).items()} == {"a": "succeeded"}


def test_an_exception_costs_only_the_rows_of_that_step(ask: Ask, finish: Finish) -> None:
    """Requests of the failed step fail retryable with their text so far; waiting ones are served as if nothing was."""
    engine = Scripted(slots=2)
    for request_id in "abc":
        engine.submit(ask(request_id, "p", 4))
    engine.step()
    engine.fault = lambda rows: 1 / 0
    failed = step(engine)
    engine.fault = lambda rows: {}
    assert {request_id: (end.outcome, end.error.code, end.error.retryable) for request_id, end in failed.items()} == {
        "a": ("failed", "engine_error", True),
        "b": ("failed", "engine_error", True),
    }
    assert (failed["a"].choices[0].text, failed["a"].choices[0].finish_reason) == ("x", "error")
    assert engine.recovered == 1
    assert finish(engine)["c"].outcome == "succeeded"


def test_a_failure_of_one_row_costs_only_its_request(ask: Ask, finish: Finish) -> None:
    """A row may fail alone; its neighbours go on, its sibling choices do not."""
    engine = Scripted()
    engine.submit(ask("bad", "p", 4, n=2, temperature=1.0))
    engine.submit(ask("good", "p", 4))
    engine.fault = lambda rows: {row: Failure("nan_logits", "", True) for row in rows if row.index == 1}
    ended = finish(engine)
    assert (ended["bad"].outcome, ended["bad"].error.code) == ("failed", "nan_logits")
    assert (ended["good"].outcome, ended["good"].choices[0].text) == ("succeeded", "xxxx")
    assert engine.now_running == ["good"]


def test_shares_of_the_time_add_up_to_the_engines_busy_time(ask: Ask, finish: Finish) -> None:
    """Whatever way requests end, their busy seconds sum to the engine's, and no other time is missing."""
    engine, events = Scripted(slots=3), list[Event]()
    for at in range(12):
        engine.submit(ask(str(at), "p" * (at + 1), at + 1))
    for _ in range(4):
        events += engine.step()
    engine.cancel("6")
    engine.fault = lambda rows: 1 / 0
    events += engine.step()
    engine.fault = lambda rows: {}
    ended = finish(engine, events)
    assert len(ended) == 12
    assert {"succeeded", "cancelled", "failed"} == {end.outcome for end in ended.values()}
    assert sum(end.timings.busy_seconds for end in ended.values()) == pytest.approx(engine.health().busy_seconds)
    assert engine.health().busy_seconds > 0


def test_queue_prefill_and_decode_meet_end_to_end(ask: Ask, finish: Finish) -> None:
    """The three times partition a request's life, and the time to first token is the first two."""
    engine = Scripted(slots=1)
    engine.submit(ask("a", "p", 3))
    engine.submit(ask("b", "p", 3))
    times = finish(engine)["b"].timings
    assert times.queue_seconds > 0
    assert times.prefill_seconds > 0
    assert times.decode_seconds > 0
    assert times.time_to_first_token_seconds == pytest.approx(times.queue_seconds + times.prefill_seconds)
    assert 0 < times.detokenize_seconds < times.prefill_seconds + times.decode_seconds


def test_deltas_join_to_the_text_and_come_only_if_asked_for(
    ask: Ask, finish: Finish, shown: Callable[..., str]
) -> None:
    """A streamed request shows its text piece by piece, each after Started and before Ended; others show none."""
    engine, events = Scripted(), list[Event]()
    engine.submit(ask("told", "p", 5, n=2, temperature=1.0, stream=True))
    engine.submit(ask("quiet", "p", 5))
    ended = finish(engine, events)
    assert [shown(events, "told", choice) for choice in (0, 1)] == [choice.text for choice in ended["told"].choices]
    assert shown(events, "quiet") == ""
    mine = [type(event).__name__ for event in events if event.id == "told"]
    assert mine == ["Started", *["Delta"] * 10, "Ended"]


def test_health_says_how_long_the_step_has_run(ask: Ask) -> None:
    """Between steps there is no step; within one its age is known, from any thread."""
    engine, ages = Scripted(), list[Any]()
    engine.submit(ask("a", "p", 1))

    def look(rows: Sequence[Row]) -> dict[Row, Failure]:
        ages.append(engine.health())
        return {}

    engine.fault = look
    engine.step()
    assert ages[0].step_seconds >= 0
    assert ages[0].running == 1
    assert engine.health().step_seconds is None
    assert (engine.health().steps, engine.health().running) == (1, 0)


def test_health_tells_the_longest_steps(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones, which compile, apart from all others; a step in progress is none of them yet."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    engine, seconds = Scripted(), [30.0, 2.0, *[1.0] * (FIRST_STEPS - 2), 0.25, 4.0, 0.5]
    engine.submit(ask("a", "p", len(seconds)))
    for one in seconds:
        engine.fault = lambda _, one=one: setattr(clock, "now", clock.now + one) or {}
        engine.step()
    health = engine.health()
    assert (health.steps, health.first_steps_seconds, health.later_steps_seconds) == (len(seconds), 30.0, 4.0)


def test_close_forgets_everything(ask: Ask) -> None:
    """A closed engine has no work and no rows."""
    engine = Scripted()
    engine.submit(ask("a", "p"))
    engine.step()
    engine.close()
    assert not engine.has_work()
    assert engine.step() == []
