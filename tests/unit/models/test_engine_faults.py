"""A fault costs only its owner, and nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from models.catalog import ModelSpec
from models.engine import load_engine
from models.protocol import Ended, Event, GenerationRequest, InvalidRequest, ModelLoadError
from models.scheduler import Work
from models.transformers_engine import TransformersEngine

Ask = Callable[..., GenerationRequest]
Finish = Callable[..., dict[str, Ended]]


def load(folder: Path, **spec: Any) -> TransformersEngine:
    engine = load_engine(ModelSpec(name="tiny", path=str(folder), **{"slots": 8, **spec}), "cpu")
    assert isinstance(engine, TransformersEngine)
    return engine


@pytest.fixture
def llama(tiny_model: Callable[..., tuple[Path, Any]]) -> Iterator[TransformersEngine]:
    engine = load(tiny_model()[0])
    yield engine
    engine.close()


@pytest.fixture
def clean(tiny_model: Callable[..., tuple[Path, Any]], ask: Ask, finish: Finish) -> dict[str, tuple[int, ...]]:
    """What six requests say where nothing goes wrong."""
    engine = load(tiny_model()[0])
    return answers(finish(submit_six(engine, ask)))


def submit_six(engine: TransformersEngine, ask: Ask) -> TransformersEngine:
    for at in range(6):
        sampling = {"temperature": 1.0, "seed": at} if at % 2 else {}
        engine.submit(ask(str(at), f"request number {at}" * (at + 1), 12, **sampling))
    return engine


def answers(ended: dict[str, Ended]) -> dict[str, tuple[int, ...]]:
    return {request_id: end.choices[0].token_ids for request_id, end in ended.items() if end.outcome == "succeeded"}


def break_runs(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Sequence[Work]], None]
) -> list[list[str]]:
    """Call `fault` before each forward pass; it may raise. Returns the rows of each pass, as they come."""
    run, passes = engine._runner.run, []

    def faulty(works: Sequence[Work]) -> Tensor:
        passes.append([work.row.flight.request.id for work in works])
        fault(works)
        return run(works)

    monkeypatch.setattr(engine._runner, "run", faulty)
    return passes


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("boom"), "engine_error"), (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory")],
)
def test_the_guilty_row_is_found_and_fails_alone(  # noqa: PLR0917  fixtures
    error: Exception,
    code: str,
    llama: TransformersEngine,
    clean: dict[str, tuple[int, ...]],
    ask: Ask,
    finish: Finish,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step that fails is halved until one row is left; the others say what they would have said."""

    def fault(works: Sequence[Work]) -> None:
        if any(work.row.flight.request.id == "3" and work.row.token_ids for work in works):
            raise error

    break_runs(llama, monkeypatch, fault)
    ended = finish(submit_six(llama, ask))
    failed = {request_id: end.error and (end.error.code, end.error.retryable) for request_id, end in ended.items()}
    assert failed == {**dict.fromkeys("01245"), "3": (code, True)}
    assert answers(ended) == {request_id: ids for request_id, ids in clean.items() if request_id != "3"}
    assert len(ended["3"].choices[0].token_ids) == 1
    llama._blocks.check()


def test_out_of_memory_makes_steps_smaller_and_costs_nobody(
    llama: TransformersEngine,
    clean: dict[str, tuple[int, ...]],
    ask: Ask,
    finish: Finish,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of more than 10 tokens do not fit: the budget shrinks below, and every answer is as ever."""

    def fault(works: Sequence[Work]) -> None:
        if sum(work.tokens for work in works) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")

    passes = break_runs(llama, monkeypatch, fault)
    assert answers(finish(submit_six(llama, ask))) == clean
    assert llama._budget.tokens <= 10
    assert len(passes) > 12


def test_a_cancelled_request_ends_with_what_it_has(llama: TransformersEngine, ask: Ask) -> None:
    """In the step after the cancel, with an event; one that waits ends empty."""
    for at in range(9):
        llama.submit(ask(str(at), "hello", 50))
    llama.step()
    for request_id in ("0", "8", "no such id"):
        llama.cancel(request_id)
    ended = {event.id: event for event in llama.step() if isinstance(event, Ended)}
    assert {request_id: end.outcome for request_id, end in ended.items()} == {"0": "cancelled", "8": "cancelled"}
    assert len(ended["0"].choices[0].token_ids) == 1
    assert ended["8"].choices == ()


def test_a_request_that_never_fits_the_pool_is_refused(tiny_model: Callable[..., tuple[Path, Any]], ask: Ask) -> None:
    """Intake knows how many tokens the pool holds, and loading fails if that is next to nothing."""
    folder, _ = tiny_model()
    token_bytes = 3 * 2 * 2 * 16 * 4
    engine = load(folder, kv_memory_bytes=5 * 16 * token_bytes)
    with pytest.raises(InvalidRequest, match="max_tokens: 60 after a prompt of 5 is above the context of 64"):
        engine.submit(ask("a", "hello", 60))
    with pytest.raises(ModelLoadError, match="tiny: kv_memory_bytes"):
        load(folder, kv_memory_bytes=2 * 16 * token_bytes)


def test_a_turn_computes_only_what_is_new(llama: TransformersEngine, ask: Ask, finish: Finish) -> None:
    """Each turn's prompt is the text before it and some more; only the last token before it is computed again."""
    draw = random.Random(3)
    for salt in ("ada", "bob"):
        history: list[int] = []
        for turn in range(5):
            new = [draw.randrange(256) for _ in range(30)]
            request = ask(f"{salt} {turn}", [*history, *new], 23, ignore_eos=True)
            object.__setattr__(request, "cache_salt", salt)
            llama.submit(request)
            end = finish(llama)[request.id]
            computed = end.usage.prompt_tokens - end.usage.cached_tokens
            assert computed == (len(new) + 1 if turn else len(new))
            history += [*new, *end.choices[0].token_ids]
        draw = random.Random(3)  # the other tenant says the same, and finds nothing


def test_the_shares_of_failed_steps_add_up_too(
    llama: TransformersEngine, ask: Ask, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all requests are charged is what the engine was busy, whatever went wrong meanwhile."""
    draw = random.Random(5)

    def fault(works: Sequence[Work]) -> None:
        if draw.random() < 0.2:
            raise RuntimeError("boom")

    break_runs(llama, monkeypatch, fault)
    ended = finish(submit_six(llama, ask))
    total = sum(end.timings.busy_seconds for end in ended.values())
    assert total == pytest.approx(llama.health().busy_seconds, rel=1e-6)


@pytest.mark.filterwarnings("error")
def test_ten_thousand_requests_leave_nothing_behind(
    tiny_model: Callable[..., tuple[Path, Any]], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short ones, with random cancels, exceptions and NaN: each ends once, all blocks come back, memory stays flat."""
    engine = load(tiny_model("llama", num_hidden_layers=1, hidden_size=32)[0], slots=64, kv_memory_bytes=400_000)
    draw = random.Random(11)
    run = engine._runner.run

    def faulty(works: Sequence[Work]) -> Tensor:
        if draw.random() < 0.01:
            raise RuntimeError("boom")
        logits = run(works)
        if len(logits) and draw.random() < 0.02:
            logits[draw.randrange(len(logits))] = torch.nan
        return logits

    monkeypatch.setattr(engine._runner, "run", faulty)
    monkeypatch.setattr("models.transformers_engine.log.disabled", True)
    rss: list[int] = []
    ends: dict[str, int] = {}
    for thousand in range(10):
        for at in range(1_000):
            prompt = [draw.randrange(256) for _ in range(draw.randint(1, 12))]
            engine.submit(ask(f"{thousand} {at}", prompt, draw.randint(1, 6)))
        while engine.has_work():
            if draw.random() < 0.2:
                engine.cancel(f"{thousand} {draw.randrange(1_000)}")
            count(engine.step(), ends)
        engine._blocks.check()
        assert engine._blocks.used == 0
        rss.append(psutil.Process().memory_info().rss)
    assert len(ends) == 10_000
    assert set(ends.values()) == {1}
    assert rss[-1] < 1.05 * rss[4]


def count(events: list[Event], ends: dict[str, int]) -> None:
    for event in events:
        if isinstance(event, Ended):
            ends[event.id] = ends.get(event.id, 0) + 1
