"""The workloads by name. Standard library only."""

from collections.abc import Mapping
from typing import Any, Protocol

from benchmarks.engine import conversations, first_token, mixed
from benchmarks.engine.serving import Serving, Setup


class Workload(Protocol):
    """One measurement of an engine that is loaded."""

    def __call__(self, serving: Serving, setup: Setup, *, quick: bool) -> Mapping[str, Any]:
        """Warm up, serve, count; returns what goes into the record."""


WORKLOADS: dict[str, Workload] = {
    "mixed": mixed.run,
    "conversations": conversations.run,
    "first_token": first_token.run,
}
