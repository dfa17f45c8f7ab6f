"""What people see: durations, dollars, tables of 80 columns, and how a run shows that it gets on."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from rich.console import Console

from headrace import show
from headrace.progress import Lines, Pace, count, display, pace
from jobs.figures import Figures, Gpu, Process
from jobs.leases import Worker
from jobs.schema import Choice, Cost, Job, JobError, Timings, Usage
from jobs.states import Lane, State, WorkerState
from producer.bulk import BulkProgress, BulkReport

WIDTH = 80
JOB_ID = UUID("01a2087d-41ec-78fc-9d23-8e63e0e87750")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns, without colours."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("NO_COLOR", "1")


def job(**fields: Any) -> Job:
    """A job that succeeded, but for these fields."""
    now = datetime.now(UTC)
    usual: dict[str, Any] = {
        "id": JOB_ID,
        "tenant_id": "local",
        "state": State.SUCCEEDED,
        "model": "tiny-chat",
        "lane": Lane.INTERACTIVE,
        "priority": 5,
        "attempts": 1,
        "max_attempts": 3,
        "created_at": now - timedelta(seconds=90),
        "started_at": now - timedelta(seconds=89),
        "finished_at": now - timedelta(seconds=88.5),
        "choices": (Choice(index=0, text="12 + 30 = 42.", finish_reason="stop"),),
        "usage": Usage(prompt_tokens=1200, cached_tokens=200, completion_tokens=14),
        "timings": Timings(
            queue_seconds=1, prefill_seconds=0.2, decode_seconds=61, time_to_first_token_seconds=1.2, busy_seconds=3
        ),
        "cost": Cost(busy_seconds=3, token_dollars=Decimal("0.0000123"), machine_dollars=Decimal("1234.5")),
    }
    return Job(**(usual | fields))


def report(**fields: Any) -> BulkReport:
    """A run of which one of ten jobs failed, but for these fields."""
    usual: dict[str, Any] = {
        "batch_id": JOB_ID,
        "total": 10,
        "succeeded": 9,
        "failed": 1,
        "rejected": 0,
        "prompt_tokens": 5000,
        "completion_tokens": 2000,
        "wall_seconds": 4.0,
        "latency_p50_seconds": 0.25,
        "latency_p95_seconds": 1.5,
        "token_dollars": 0.5,
        "machine_dollars": 0.0001,
        "samples": [],
    }
    return BulkReport(**(usual | fields))


def printed(value: Any) -> str:
    """What a console of 80 columns makes of it."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    console.print(value)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0 ms"), (0.25, "250 ms"), (4.26, "4.3 s"), (125, "2 min 5 s"), (7260, "2 h 1 min")],
)
def test_durations_have_two_or_three_digits(seconds: float, text: str) -> None:
    """The unit grows with the duration."""
    assert show.seconds(seconds) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "$0.00"), (Decimal("1234.5"), "$1,234.50"), (0.04567, "$0.0457"), (Decimal("2.5E-7"), "$0.00000025")],
)
def test_small_amounts_are_not_rounded_away(amount: Decimal | float, text: str) -> None:
    """Cents for dollars, three digits that count for fractions, never an exponent."""
    assert show.dollars(amount) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (150, "2 min"), (7300, "2 h"), (200_000, "2 d")])
def test_ages_have_one_unit(seconds: float, text: str) -> None:
    """Only the largest unit is shown."""
    assert show.ago(datetime.now(UTC) - timedelta(seconds=seconds)) == text


def test_one_json_object_carries_what_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    """Ids become text, exact dollars numbers, moments ISO 8601."""
    show.emit({"id": JOB_ID, "dollars": Decimal("0.5"), "at": datetime(2026, 1, 2, tzinfo=UTC)})
    assert json.loads(capsys.readouterr().out) == {"id": str(JOB_ID), "dollars": 0.5, "at": "2026-01-02T00:00:00Z"}


def test_a_job_as_json_has_its_text_and_exact_dollars() -> None:
    """The first choice's text is at hand, and no dollar goes through a float."""
    fields = show.job_json(job())
    assert (fields["text"], fields["state"], fields["cost"]["token_dollars"]) == (
        "12 + 30 = 42.",
        "succeeded",
        "0.0000123",
    )


def test_everything_about_a_job_is_shown_and_nothing_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens, times, cost and text have their lines; what the job does not have has none."""
    show.job(job(error=JobError(code="engine_error", message="[red]it broke")))
    out = capsys.readouterr().out
    assert "1,200 in (200 cached), 14 out" in out
    assert "queue 1.0 s, prefill 200 ms, decode 1 min 1 s" in out
    assert "$0.0000123 by tokens, $1,234.50 by machine time" in out
    assert "12 + 30 = 42." in out
    assert "engine_error: [red]it broke" in out
    assert "conversation" not in out
    assert "batch" not in out


def test_an_answer_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """What a pipe gets is the text as the model wrote it, however long; how it came about is on stderr."""
    text = "[bold] " + "word " * 50
    show.answer(job(choices=(Choice(index=0, text=text, finish_reason="stop"),)))
    captured = capsys.readouterr()
    assert captured.out == f"{text}\n"
    assert "1,200 tokens in, 14 out" in captured.err


def test_lists_fit_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """A long model name gives way to the id and the numbers."""
    show.jobs([job(), job(model="some-organisation/a-model-with-a-very-long-name-7B-instruct", state=State.RUNNING)])
    started = datetime.now(UTC) - timedelta(hours=3)
    model = "some-organisation/a-model-with-a-very-long-name"
    worker = Worker(JOB_ID, WorkerState.LIVE, model, "host", 4_000_000, 64, 3, True, {}, 12.0, started, 9.0)
    process = Process(cpu_seconds=100.0, cpu_cores=1.25, resident_bytes=3 << 30)
    gpu = Gpu("NVIDIA H200", 0.97, 100 << 30, 139 << 30)
    show.workers([replace(worker, figures=Figures({"consumer": process, "engine": process}, gpu))])
    lines = capsys.readouterr().out.splitlines()
    used = "NVIDIA H200: 97%, 100.0 of 139.0 GiB 2.5 6.0 GiB host"
    assert any(used in " ".join(line.split()) for line in lines)
    assert max(map(len, lines)) <= WIDTH
    assert sum(str(JOB_ID) in line for line in lines) == 2
    assert any("4000000" in line for line in lines)


def test_an_empty_list_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """No heading without rows."""
    show.jobs([])
    show.workers([])
    assert capsys.readouterr().out.split("\n") == ["no jobs", "no live workers", ""]


def test_a_report_names_rates_latency_and_cost() -> None:
    """Everything that a run is judged by, in 80 columns."""
    text = printed(show.report(report(), Path("out.jsonl"), continued=False))
    for part in (
        "10 in 4.0 s, 2.5 jobs/s",
        "5,000 in, 2,000 out, 500.0 tokens/s",
        "p50 250 ms, p95 1.5 s",
        "$0.5 by tokens",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_a_continued_run_claims_no_rate() -> None:
    """The time of the last part says nothing about the jobs of all parts."""
    text = printed(show.report(report(latency_p50_seconds=None), Path("out.jsonl"), continued=True))
    assert "/s" not in text
    assert "none" in text


def test_samples_and_next_steps_fit_into_80_columns() -> None:
    """Long questions are cut, commands are not."""
    text = printed(show.sample("why " * 500, "so\n\nit is")) + printed(show.next_steps())
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "so it is" in text
    assert 'headrace submit "What is 12 + 30?" --wait' in text


# -- progress -----------------------------------------------------------------------------------------------------


def at(ended: int, *, total: int | None = 100, failed: int = 0, phase: Any = "running") -> BulkProgress:
    """Progress of a run at a moment."""
    return BulkProgress(total, ended, failed, input_bytes=1000, input_offset=500, phase=phase)


def test_the_rate_counts_from_the_first_row_that_ends() -> None:
    """Neither the wait for a worker nor what an earlier part had ended is in the rate."""
    rate = Pace()
    for now, ended in [(0.0, 40), (30.0, 40), (31.0, 50), (32.0, 60)]:
        rate.add(now, ended)
    assert rate.per_second == 10


def test_the_rate_follows_the_last_while() -> None:
    """A slow start is forgotten."""
    rate = Pace()
    for second in range(100):
        rate.add(float(second), second if second < 50 else 50 + (second - 50) * 10)
    assert rate.per_second == pytest.approx(10)


def test_no_rate_is_claimed_before_anything_ended() -> None:
    """Without a row there is no rate, and without a rate no time left."""
    rate = Pace()
    assert rate.per_second == 0
    assert pace(at(0), rate.per_second) == ""


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (at(50), "5.0/s, 10.0 s left"),
        (at(50, total=None, phase="reading"), "5.0/s"),
        (at(100, phase="writing"), "5.0/s"),
    ],
)
def test_time_left_is_told_while_it_can_be_known(progress: BulkProgress, text: str) -> None:
    """Only when the number of rows is known and rows still run."""
    assert pace(progress, 5.0) == text


def test_counts_have_their_total_once_it_is_known() -> None:
    """Thousands are separated."""
    assert (count(at(1234, total=7473)), count(at(1234, total=None))) == ("1,234/7,473", "1,234")


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    """Each phase has its line; within a phase not every look has one."""
    console = Console(file=io.StringIO(), width=200)
    with display(console) as show_progress:
        assert isinstance(show_progress, Lines)
        for progress in (at(0, total=None, phase="reading"), at(0), at(1, failed=1), at(2), at(3), at(4)):
            show_progress(progress)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[:2] == ["reading: 0", "waiting for a worker: 0/100"]
    assert lines[2].startswith("running: 1/100, 1 failed, ")
    assert len(lines) == 3


def test_on_a_terminal_there_is_a_bar() -> None:
    """It shows how many ended and how many failed, in one line of 80 columns."""
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=True, legacy_windows=False)
    with display(console) as show_progress:
        show_progress(at(0, total=None, phase="reading"))
        show_progress(at(61, total=7473, failed=2))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "61/7,473" in text
    assert "2 failed" in text


def test_steps_tell_what_took_how_long() -> None:
    """A step leaves one line with its seconds, and what it failed with passes through."""
    console = Console(file=io.StringIO(), width=WIDTH)
    terminal = show.Terminal(console)
    with terminal.step("tables"):
        pass
    with pytest.raises(ValueError, match="no"), terminal.step("never"):
        raise ValueError("no")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1
    assert lines[0].split() == ["tables", "0.0", "s"]
