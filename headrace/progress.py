"""How a bulk run shows that it gets on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from headrace.show import seconds

if TYPE_CHECKING:
    from producer.bulk import BulkProgress

# The rate is taken over this time: long enough to be steady, short enough to tell when it changes.
_PACE_SECONDS = 15.0
_LINE_SECONDS = 5.0


class Pace:
    """Rows per second over the last while, from the moment the first row ends."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now: float, ended: int) -> None:
        """At that time so many had ended."""
        if self._seen and ended == self._seen[0][1]:
            self._seen.clear()
        self._seen.append((now, ended))
        while len(self._seen) > 2 and now - self._seen[1][0] > _PACE_SECONDS:  # noqa: PLR2004  the ends of a span
            self._seen.popleft()

    @property
    def per_second(self) -> float:
        """0 until something has ended."""
        if not self._seen:
            return 0.0
        (start, before), (end, after) = self._seen[0], self._seen[-1]
        return (after - before) / (end - start) if end > start else 0.0


class Display(Protocol):
    """Takes what a run says of itself."""

    def __call__(self, progress: BulkProgress) -> None: ...


@contextmanager
def display(console: Console) -> Iterator[Display]:
    """The display that suits the console."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = [
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[count]}"),
        TextColumn("[dim]{task.fields[pace]}"),
        TextColumn("[red]{task.fields[failures]}"),
    ]
    with Progress(*columns, console=console, expand=True, transient=True) as bar:
        yield Bar(bar)


class Bar:
    """One bar, for reading and for running."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._pace = Pace()
        self._task = bar.add_task("starting", total=None, count="", pace="", failures="")

    def __call__(self, progress: BulkProgress) -> None:
        """Show where the run is now."""
        reading = progress.phase == "reading"
        if not reading:  # what ended before this run is known once all is read
            self._pace.add(time.monotonic(), progress.ended)
        self._bar.update(
            self._task,
            description=_phase(progress),
            total=progress.input_bytes if reading else progress.total,
            completed=progress.input_offset if reading else progress.ended,
            count="" if reading else count(progress),
            pace=pace(progress, self._pace.per_second),
            failures=f"{progress.failed:,} failed" if progress.failed else "",
        )


class Lines:
    """A line every few seconds, and one at each new phase."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = Pace()
        self._phase = ""
        self._due = 0.0

    def __call__(self, progress: BulkProgress) -> None:
        """Say where the run is, if it is time to."""
        now = time.monotonic()
        phase = _phase(progress)
        if progress.phase != "reading":  # what ended before this run is known once all is read
            self._pace.add(now, progress.ended)
        if now < self._due and phase == self._phase:
            return
        self._phase, self._due = phase, now + _LINE_SECONDS
        failures = f"{progress.failed:,} failed" if progress.failed else ""
        parts = [f"{phase}: {count(progress)}", failures, pace(progress, self._pace.per_second)]
        self._console.print(", ".join(part for part in parts if part), soft_wrap=True, markup=False)


def count(progress: BulkProgress) -> str:
    """How many of how many."""
    return f"{progress.ended:,}" if progress.total is None else f"{progress.ended:,}/{progress.total:,}"


def pace(progress: BulkProgress, per_second: float) -> str:
    """The rate, and how long it will take at this rate."""
    if not per_second:
        return ""
    rate = f"{per_second:,.0f}/s" if per_second >= 10 else f"{per_second:.1f}/s"  # noqa: PLR2004  two digits
    if progress.total is None or progress.phase != "running":
        return rate
    return f"{rate}, {seconds((progress.total - progress.ended) / per_second)} left"


def _phase(progress: BulkProgress) -> str:
    if progress.phase == "running" and not progress.ended:
        return "waiting for a worker"
    return progress.phase
