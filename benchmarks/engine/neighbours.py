"""Whether a measurement had the machine to itself. Standard library only."""

import os
import resource
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE_COLUMNS = (3, 4)  # idle, iowait; see proc_stat(5)
_GUEST_COLUMNS = 8  # from here on what other columns hold already


class Neighbours:
    """Counts processor time from its making on; our own is that of this process's children that have ended."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy_seconds = _busy_seconds()
        self._ours_seconds = _children_seconds()

    def cores(self) -> float | None:
        """How many cores were busy with other things, on average; None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self._busy_seconds is None:
            return None
        others = (busy - self._busy_seconds) - (_children_seconds() - self._ours_seconds)
        return max(0.0, others / (time.monotonic() - self._began))


def _busy_seconds() -> float | None:
    """Of all cores since the machine started."""
    try:
        ticks = [int(value) for value in _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    except OSError:
        return None
    busy = sum(count for column, count in enumerate(ticks[:_GUEST_COLUMNS]) if column not in _IDLE_COLUMNS)
    return busy / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
