"""How a stack says what it is doing. The command line's way is in `headrace.show`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Teller(Protocol):
    """Hears of steps and events."""

    def step(self, what: str) -> AbstractContextManager[object]:
        """Something that takes a while: the time inside the context."""

    def note(self, text: str) -> None:
        """Something that happened."""


class Silent:
    """Says nothing."""

    def step(self, what: str) -> AbstractContextManager[object]:  # noqa: ARG002
        """Nothing."""
        return nullcontext()

    def note(self, text: str) -> None:
        """Nothing."""
