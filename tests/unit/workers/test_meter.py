"""What the processes of a worker use, read off the kernel."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from kit.waiting import wait_until
from workers.meter import Meter


def test_this_process() -> None:
    """Its figures are those that others read, and its cores what it used since the look before."""
    meter = Meter()
    first = meter.look({"me": os.getpid()})["me"]
    assert first.cpu_cores == 0.0
    wait_until(lambda: bool(sum(range(100_000))) and time.process_time() > first.cpu_seconds + 0.2, 30, "it has worked")
    second = meter.look({"me": os.getpid()})["me"]
    assert 0.0 < second.cpu_cores <= (os.cpu_count() or 1)
    assert second.cpu_seconds == pytest.approx(time.process_time(), abs=0.2)
    assert second.resident_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_who_is_gone_is_left_out() -> None:
    """And does not keep the others from being told."""
    assert set(Meter().look({"me": os.getpid(), "nobody": 2**22 + 1})) == {"me"}
