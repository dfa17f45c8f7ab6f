"""What the processes of a worker use, as the kernel counts it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from jobs.figures import Process

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Of /proc/PID/stat, behind the name, which may hold anything (man 5 proc).
_UTIME, _STIME, _RSS = 11, 12, 21


class Meter:
    """Reads it off /proc. One thread owns it."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[float, float]] = {}  # by pid: the clock, and seconds of processors up to then

    def look(self, pids: Mapping[str, int]) -> dict[str, Process]:
        """Those of these that run, by the same names."""
        now = time.monotonic()
        found = {name: (pid, *counted) for name, pid in pids.items() if (counted := _counted(pid))}
        processes = {
            name: Process(cpu_seconds, self._cores(pid, now, cpu_seconds), resident_bytes)
            for name, (pid, cpu_seconds, resident_bytes) in found.items()
        }
        self._before = {pid: (now, cpu_seconds) for pid, cpu_seconds, _ in found.values()}
        return processes

    def _cores(self, pid: int, now: float, cpu_seconds: float) -> float:
        then, before = self._before.get(pid, (now, cpu_seconds))
        return round((cpu_seconds - before) / (now - then), 3) if now > then else 0.0


def _counted(pid: int) -> tuple[float, int] | None:
    """Seconds of processors, and bytes in memory; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    ticks = int(fields[_UTIME]) + int(fields[_STIME])
    return ticks / _TICKS_PER_SECOND, int(fields[_RSS]) * _PAGE_BYTES
