"""One module for each engine, imported by that engine's own interpreter: `load(setup)` gives a `Serving`.

A module imports its engine inside `load`; at import it needs the standard library only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from headrace.bench import Load

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""Of those engines that compute with torch."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How an engine is to be loaded."""

    folder: Path  # of the model
    precision: str  # bf16, fp16, fp32 or int8, of the weights
    width: int  # rows computed together
    threads: int
    reuse: bool = False  # whether cached keys and values of earlier requests may be used
    kv_memory_gib: int = 2
    context_tokens: int = 8_192


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a load. `cached_tokens` of its prompt were not computed; None: the engine does not tell."""

    id: str
    token_ids: tuple[int, ...]
    cached_tokens: int | None = None


Then = Callable[[Answer], Sequence[Load]]
"""The loads that follow once this answer is there."""


class Serving(Protocol):
    """An engine with the model in it."""

    version: str
    knows_salts: bool  # whether a load's salt keeps what it caches from others

    def serve(self, loads: Sequence[Load], then: Then) -> Iterator[Answer]:
        """Take all loads at once, and each that follows as soon as the answer before it is there."""
