"""`python -m benchmarks engine`: every engine that is there, in interleaved rounds."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engine import roofline
from benchmarks.engine.contestants import CONTESTANTS
from benchmarks.engine.model import FULL, SMALL, make
from benchmarks.engine.neighbours import Neighbours
from benchmarks.engine.places import REPOSITORY
from benchmarks.engine.plan import Run, runs
from benchmarks.engine.results import Results, summary, write
from benchmarks.turns import held

_LIMIT_SECONDS = 1800  # of one run; a peer that hangs must not keep the others
_ERROR_LINES = 3
_TOLERATED_CORES = 0.2


def measure(*, quick: bool, rounds: int | None = None, only_width: int | None = None, lock: Path | None = None) -> bool:
    """Returns whether every promise that could be checked was held; --quick promises nothing.

    `lock` is a file that is held during each run, where other measurements share the machine.
    """
    console = Console(stderr=True)
    model = make(SMALL if quick else FULL)
    absent = [contestant.name for contestant in CONTESTANTS.values() if contestant.python is None]
    for name in absent:
        console.print(f"{name} is absent: `make bench-peers` makes its environment")
    with held(lock):
        ceiling = {} if quick else _roofline()
    results = Results()
    for number in range(rounds or (1 if quick else 3)):
        best = results.worth_repeating() if number else {}
        for run in runs(number, best, quick=quick, only_width=only_width):
            if run.case.engine in absent:
                continue
            with held(lock):
                record = _record(run, model, console, quick=quick)
            if record:
                results.add(run.case, record)
            if not quick:
                write(summary(results, ceiling, absent))  # after each, so that an hour is not lost to its last minute
    found = summary(results, ceiling, absent)
    _show(found, Console(), quick=quick)
    return quick or all(promise["held"] is not False for promise in found["promises"])


def _roofline() -> dict[str, Any]:
    """In a process of its own, as every measurement."""
    command = [sys.executable, "-m", "benchmarks.engine.roofline"]
    found = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout
    rates: dict[str, Any] = json.loads(found)
    ideal = {name: round(roofline.ideal_seconds(gflops), 2) for name, gflops in rates["gemm_gflops"].items()}
    return {**rates, "ideal_seconds": ideal}


def _record(run: Run, model: Path, console: Console, *, quick: bool) -> Mapping[str, Any] | None:
    """What the run's process prints; None, and its last words told, if it fails."""
    case = run.case
    name = f"{case.workload} {case.engine} {case.precision} width {run.width}{' reuse' if case.reuse else ''}"
    command = [str(run.contestant.python), "-m", "benchmarks.engine.run_one", "--model", str(model)]
    command += ["--engine", case.engine, "--workload", case.workload]
    command += ["--precision", case.precision, "--width", str(run.width)]
    command += ["--reuse"] * case.reuse + ["--quick"] * quick
    environment = run.contestant.environment()
    neighbours = Neighbours()
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            timeout=_LIMIT_SECONDS,
            capture_output=True,
            text=True,
            check=True,
        )
        found = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    except (subprocess.SubprocessError, StopIteration) as error:
        words = (getattr(error, "stderr", None) or "").strip().splitlines()[-_ERROR_LINES:]
        reason = f"{type(error).__name__}, exit status {getattr(error, 'returncode', 'unknown')}"
        console.print(f"{name} failed: {reason}", *words, sep="\n  ", markup=False)
        return None
    cores = neighbours.cores()
    record: dict[str, Any] = json.loads(found) | {"other_cores_busy": None if cores is None else round(cores, 2)}
    console.print(f"{name}: {record.get('tokens_per_second', '')} tokens/s, {record.get('wall_seconds', '')} s")
    if cores and cores > _TOLERATED_CORES:
        console.print(f"  {cores:.1f} cores were busy with other things meanwhile: do not trust it", style="red")
    return record


def _show(found: Mapping[str, Any], console: Console, *, quick: bool) -> None:
    table = Table(title="engines", title_justify="left")
    for column in ("workload", "engine", "precision", "width", "tokens/s", "seconds", "of the ideal"):
        table.add_column(column, justify="left" if column in ("workload", "engine", "precision") else "right")
    for record in found["records"]:
        if "tokens_per_second" in record:
            share = record.get("share_of_ideal")
            workload = record["workload"] + (", reuse" if record["reuse"] else "")
            table.add_row(
                workload,
                f"{record['engine']} {record['version']}",
                record["precision"],
                str(record["width"]),
                f"{record['tokens_per_second']:,.1f}",
                f"{record['wall_seconds']:,.1f}",
                "" if share is None else f"{share:.0%}",
            )
    console.print(table)
    for promise in () if quick else found["promises"]:
        word = {True: "held", False: "MISSED", None: "not checked"}[promise["held"]]
        console.print(f"{promise['promise']}: {promise['figure']} [bold]{word}[/bold]")
