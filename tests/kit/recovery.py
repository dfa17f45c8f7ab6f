"""How long it took to recover: measured from the fault, printed, and held against what is promised."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self


class Recovery:
    """Time from the beginning of the block, in which the fault is injected first, to its end."""

    def __init__(self, what: str, within_seconds: float) -> None:
        self.seconds = 0.0
        self._what = what
        self._within_seconds = within_seconds
        self._began = 0.0

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            return
        self.seconds = time.monotonic() - self._began
        line = f"recovered from {self._what} in {self.seconds:.1f} s of {self._within_seconds:g} s"
        print(line)  # noqa: T201 - pytest -rP shows it
        assert self.seconds <= self._within_seconds, line
