"""What is told of a GPU, with a driver that is played."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from models.gpu_meter import GpuMeter
from models.protocol import GpuLoad


class NvmlError(Exception):
    pass


class Driver:
    """As much of `pynvml` as is used. A question in `silent` is refused."""

    NVMLError = NvmlError

    def __init__(self, *silent: str) -> None:
        self.silent = silent
        self.asked: list[object] = []

    def _answer(self, question: str, answer: Any) -> Any:
        if question in self.silent:
            raise NvmlError("Not Supported")
        return answer

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        self.asked.append(handle)
        return self._answer("memory", SimpleNamespace(used=3, total=4))

    def nvmlDeviceGetUtilizationRates(self, _: str) -> Any:  # noqa: N802
        return self._answer("utilization", SimpleNamespace(gpu=97))


@pytest.mark.parametrize(
    ("silent", "told"),
    [
        ((), GpuLoad("H200", 0.97, 3, 4)),
        (("utilization",), GpuLoad("H200", None, 3, 4)),
        (("memory",), None),
        (("init",), None),
    ],
)
def test_what_the_driver_says(silent: tuple[str, ...], told: GpuLoad | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as it does say."""
    driver = Driver(*silent)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert GpuMeter("7d0f", "H200").look() == told
    assert driver.asked == [] if "init" in silent else driver.asked == ["GPU-7d0f", "handle"]


def test_without_the_package_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing fails."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMeter("7d0f", "H200").look() is None
