"""What a worker tells those who watch, at each heartbeat: of its processes, its GPU, and how long its jobs took."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

# Seconds: from an answer of the cache to a night in the queue. The last bucket of a distribution has no bound.
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 3_600.0)


@dataclass(frozen=True, slots=True)
class Process:
    """What one process of a worker uses."""

    cpu_seconds: float  # since it started
    cpu_cores: float  # how many were busy for it, since the heartbeat before
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver sees it, whoever uses it."""

    name: str
    utilization: float | None  # share of the last moments in which it computed; None: it does not say
    memory_used_bytes: int
    memory_total_bytes: int


@dataclass(slots=True)
class Distribution:
    """How many took how long. One thread writes."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0  # all together

    def note(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


@dataclass(slots=True)
class Latencies:
    """Of the jobs of one lane that a worker has answered. All are counted from when a job could start."""

    queue: Distribution = field(default_factory=Distribution)  # to its first step
    first_token: Distribution = field(default_factory=Distribution)
    job: Distribution = field(default_factory=Distribution)  # to its end


@dataclass(frozen=True, slots=True)
class Figures:
    """All of it."""

    processes: Mapping[str, Process] = field(default_factory=dict)  # by name
    gpu: Gpu | None = None
    steps: int = 0  # of the engine, since it started
    latencies: Mapping[str, Latencies] = field(default_factory=dict)  # by lane

    @classmethod
    def read(cls, told: Mapping[str, Any] | None) -> Self:
        """As it was stored; nothing of a worker that has told nothing yet."""
        if told is None:
            return cls()
        return cls(
            processes={name: Process(**process) for name, process in told["processes"].items()},
            gpu=None if told["gpu"] is None else Gpu(**told["gpu"]),
            steps=told["steps"],
            latencies={
                lane: Latencies(**{name: Distribution(**one) for name, one in of_lane.items()})
                for lane, of_lane in told["latencies"].items()
            },
        )

    @property
    def cpu_cores(self) -> float:
        """Of all processes together."""
        return sum(process.cpu_cores for process in self.processes.values())

    @property
    def resident_bytes(self) -> int:
        """Of all processes together."""
        return sum(process.resident_bytes for process in self.processes.values())
