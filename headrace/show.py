"""What the command line looks like: one JSON object for programs, short tables for people, the rest on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.states import State

if TYPE_CHECKING:
    from pathlib import Path

    from headrace.doctor import Finding
    from jobs.failures import DeadLetter
    from jobs.keys import KeyRecord
    from jobs.leases import Worker
    from jobs.schema import Job
    from jobs.webhooks import DeliveryRecord
    from producer.bulk import BulkReport

_MINUTE_SECONDS = 60
_HOUR_SECONDS = 3_600
_DAY_SECONDS = 86_400
_SAMPLE_CHARACTERS = 200
_COLOURS = {
    State.SUCCEEDED: "green",
    State.RUNNING: "cyan",
    State.FAILED: "red",
    State.EXPIRED: "red",
    State.CANCELLED: "yellow",
}


def out() -> Console:
    """Results, for people."""
    return Console(highlight=False)


def err() -> Console:
    """Everything that is no result."""
    return Console(stderr=True, highlight=False)


def emit(value: dict[str, Any]) -> None:
    """The one JSON object of a command."""
    options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS
    sys.stdout.write(orjson.dumps(value, default=_plain, option=options).decode())
    sys.stdout.flush()


def _plain(value: object) -> object:
    return float(value) if isinstance(value, Decimal) else str(value)


class Terminal:
    """Tells what a stack is doing, on stderr. Steps show a spinner where there is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or err()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A line when it is done, with its time."""
        start = time.monotonic()
        with self.console.status(Text(what)):
            yield
        self.console.print(Text(f"  {what:<34}{time.monotonic() - start:7.1f} s"), style="dim")

    def note(self, text: str) -> None:
        """A line at once."""
        self.console.print(Text(text), soft_wrap=True)


# -- jobs ---------------------------------------------------------------------------------------------------------


def job_json(job: Job) -> dict[str, Any]:
    """A job as JSON. Dollars are strings: they are exact."""
    return job.model_dump(mode="json") | {"text": job.text}


def answer(job: Job) -> None:
    """What a job that ended says: its texts on stdout, what it took on stderr."""
    for choice in job.choices:
        out().print(Text(choice.text), soft_wrap=True)
    notes = [state_text(job.state)]
    if job.error is not None:
        notes.append(Text(f"{job.error.code}: {job.error.message}"))
    if job.usage is not None:
        notes.append(Text(f"{job.usage.prompt_tokens:,} tokens in, {job.usage.completion_tokens:,} out"))
    if job.finished_at is not None:
        notes.append(Text(seconds((job.finished_at - job.created_at).total_seconds())))
    if job.cost is not None:
        notes.append(Text(dollars(job.cost.token_dollars)))
    err().print(Text(" | ").join(notes), style="dim", soft_wrap=True)


def job(one: Job) -> None:
    """Everything about a job that helps to understand it."""
    rows: list[tuple[str, str | Text | None]] = [
        ("job", str(one.id)),
        ("state", state_text(one.state)),
        ("model", one.model),
        ("served by", one.served_by),
        ("conversation", one.conversation and f"{one.conversation}, turn {one.turn}"),
        ("batch", None if one.batch_id is None else f"{one.batch_id}, {one.custom_id}"),
        ("created", when(one.created_at)),
        ("started", when(one.started_at)),
        ("finished", when(one.finished_at)),
        ("cancel asked", when(one.cancel_requested_at)),
        ("attempts", f"{one.attempts} of {one.max_attempts}"),
        *_result_rows(one),
        ("metadata", ", ".join(f"{name}={value}" for name, value in one.metadata.items())),
        ("error", None if one.error is None else f"{one.error.code}: {one.error.message}"),
        *(("text", choice.text) for choice in one.choices),
    ]
    out().print(facts(rows))


def _result_rows(one: Job) -> Iterator[tuple[str, str]]:
    if one.usage is not None and one.usage.prompt_tokens:
        usage = one.usage
        yield (
            "tokens",
            f"{usage.prompt_tokens:,} in ({usage.cached_tokens:,} cached), {usage.completion_tokens:,} out",
        )
    if one.timings is not None and one.timings.busy_seconds:
        timings = one.timings
        names = ("queue", "prefill", "decode")
        yield ("time", ", ".join(f"{name} {seconds(getattr(timings, f'{name}_seconds'))}" for name in names))
    if one.timings is not None and one.timings.time_to_first_token_seconds is not None:
        yield ("first token", f"after {seconds(one.timings.time_to_first_token_seconds)}")
    if one.cost is not None:
        cost = one.cost
        yield ("cost", f"{dollars(cost.token_dollars)} by tokens, {dollars(cost.machine_dollars)} by machine time")


def jobs(many: Sequence[Job]) -> None:
    """A line for each job."""
    table = _table("id", "state", "model", "age", "took")
    for one in many:
        end = one.finished_at
        table.add_row(
            str(one.id),
            state_text(one.state),
            Text(one.model, overflow="ellipsis"),
            ago(one.created_at),
            "" if end is None else seconds((end - one.created_at).total_seconds()),
        )
    out().print(table if many else "no jobs")


def workers(many: Sequence[Worker]) -> None:
    """A line for each worker."""
    table = _table("model", "state", "running", "slots", "busy", "host", "pid", "up")
    for one in many:
        state = str(one.state) if one.ready else f"{one.state}, not ready"
        columns = [state, str(one.running), str(one.slots), seconds(one.busy_seconds), one.host, str(one.pid)]
        table.add_row(Text(one.model, overflow="ellipsis"), *columns, ago(one.started_at))
    out().print(table if many else "no live workers")


def keys(many: Sequence[KeyRecord]) -> None:
    """A line for each API key; tier and models are in the JSON."""
    table = _table("id", "tenant", "roles", "tokens/min", "state")
    for one in many:
        key, limit = one.key, one.key.quota_tokens_per_minute
        table.add_row(
            str(key.id),
            Text(key.tenant_id),
            ",".join(sorted(key.roles)),
            "" if limit is None else f"{limit:,}",
            "live" if one.revoked_at is None else "revoked",
        )
    out().print(table if many else "no keys")


def deliveries(many: Sequence[DeliveryRecord]) -> None:
    """A line for each webhook, and below it of what, and why it was not delivered yet."""
    table = _table("id", "tenant", "state", "attempts", "age")
    for one in many:
        table.add_row(str(one.id), Text(one.tenant_id), one.state, str(one.attempts), ago(one.created_at))
        table.add_row(Text(f"  {_ended(one)}", style="dim", overflow="ellipsis"))
        if one.error is not None:
            table.add_row(Text(f"  {one.error}", style="red", overflow="ellipsis"))
    out().print(table if many else "no webhooks")


def _ended(one: DeliveryRecord) -> str:
    return f"batch {one.batch_id}" if one.job_id is None else f"job {one.job_id}"


def dead_letters(many: Sequence[DeadLetter]) -> None:
    """A line for each job that failed, and below it why."""
    table = _table("id", "model", "attempts", "age", "worker")
    for one in many:
        worker = "" if one.host is None else f"{one.host}, pid {one.pid}"
        columns = [str(one.attempts), ago(one.finished_at), worker]
        table.add_row(str(one.id), Text(one.model, overflow="ellipsis"), *columns)
        table.add_row(Text(f"  {one.code}: {one.message}", style="red", overflow="ellipsis"))
    out().print(table if many else "no failed jobs")


def findings(many: Sequence[Finding]) -> None:
    """A line for each thing that was looked at, and below what is wrong what to do."""
    for one in many:
        mark = Text("ok   ", style="green") if one.well else Text("WRONG", style="red")
        out().print(Text.assemble(mark, f"  {one.about}: {one.says}"), soft_wrap=True)
        if one.advice:
            out().print(Text(f"       {one.advice}"), soft_wrap=True)


# -- parts --------------------------------------------------------------------------------------------------------


def facts(rows: Iterable[tuple[str, str | Text | None]]) -> Table:
    """Names and values, those without a value left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        if value:
            grid.add_row(name, value if isinstance(value, Text) else Text(value))
    return grid


def figures(values: Mapping[str, float | str]) -> Table:
    """Names and numbers, seconds to the millisecond."""
    return facts((name.replace("_", " "), _figure(value)) for name, value in values.items())


def _figure(value: float | str) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, no_wrap=name != "model", justify="right" if name in _NUMBERS else "left")
    return table


_NUMBERS = {"attempts", "age", "took", "running", "slots", "busy", "pid", "up", "tokens/min"}


def state_text(state: State) -> Text:
    """A state in its colour."""
    return Text(state, style=_COLOURS.get(state, ""))


def seconds(value: float) -> str:
    """A duration to two or three digits."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < _MINUTE_SECONDS:
        return f"{value:.1f} s"
    if value < _HOUR_SECONDS:
        return f"{value // 60:.0f} min {value % 60:.0f} s"
    return f"{value // _HOUR_SECONDS:.0f} h {value % _HOUR_SECONDS // 60:.0f} min"


def ago(moment: datetime) -> str:
    """How long something has been, in one unit."""
    value = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for unit, size in (("d", _DAY_SECONDS), ("h", _HOUR_SECONDS), ("min", _MINUTE_SECONDS)):
        if value >= size:
            return f"{value // size:.0f} {unit}"
    return f"{value:.0f} s"


def when(moment: datetime | None) -> str | None:
    """A moment in local time."""
    return None if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def dollars(value: Decimal | float) -> str:
    """Dollars, with three digits that count where they are few."""
    amount = float(value)
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${Decimal(f'{amount:.3g}'):f}"


# -- bulk ---------------------------------------------------------------------------------------------------------


def sample(question: str, answer: str) -> Table:
    """One question and its answer, shortened."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("question", Text(shortened(question)))
    grid.add_row("answer", Text(shortened(answer), style="bold"))
    grid.add_row("", "")
    return grid


def shortened(text: str, characters: int = _SAMPLE_CHARACTERS) -> str:
    """On one line, at most so long."""
    line = " ".join(text.split())
    return line if len(line) <= characters else f"{line[: characters - 1]}…"


def report(one: BulkReport, output: Path, *, continued: bool) -> Table:
    """What a bulk run came to. One that was `continued` has no rates: its time is only that of its last part."""
    failed = one.total - one.succeeded
    per_second = 0.0 if continued or not one.wall_seconds else 1 / one.wall_seconds
    job_rate = f", {one.total * per_second:,.1f} jobs/s" if per_second else " (this part)"
    token_rate = f", {one.completion_tokens * per_second:,.1f} tokens/s out" if per_second else ""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rows: list[tuple[str, str | Text]] = [
        ("jobs", f"{one.total:,} in {seconds(one.wall_seconds)}{job_rate}"),
        ("succeeded", Text(f"{one.succeeded:,}", style="green")),
        ("failed", Text(f"{failed:,}", style="red" if failed else "")),
        ("tokens", f"{one.prompt_tokens:,} in, {one.completion_tokens:,} out{token_rate}"),
        ("latency", _latency(one)),
        ("cost", f"{dollars(one.token_dollars)} by tokens, {dollars(one.machine_dollars)} by machine time"),
        ("output", str(output)),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _latency(one: BulkReport) -> str:
    if one.latency_p50_seconds is None or one.latency_p95_seconds is None:
        return "none"
    return f"p50 {seconds(one.latency_p50_seconds)}, p95 {seconds(one.latency_p95_seconds)}"


def next_steps() -> Table:
    """What one may want to do after a run on a stack of its own."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(style="dim")
    grid.add_row("Next:", "")
    for command, why in _NEXT_STEPS:
        grid.add_row(f"  {command}", why)
    return grid


_NEXT_STEPS = (
    ("headrace up --detach", "keep a stack up, and then:"),
    ('headrace submit "What is 12 + 30?" --wait', "ask one question"),
    ("headrace run IN.jsonl -o OUT.jsonl", "answer a file, at once"),
    ("headrace list", "see what was asked"),
)
