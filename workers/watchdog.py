"""How long an engine may go without getting on before it is taken for hung: much longer than it ever took before.

An engine holds its steps to a length of its own (0.35 s on a CPU, 0.1 s on a GPU, see `models.scheduler.StepBudget`),
so one of 20 s is out of all proportion. Only the first ones may be long for a reason: kernels are compiled, graphs
captured, and the budget of tokens is not known yet. They are held against the first steps of earlier engines here.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.protocol import FIRST_STEPS, Health

# Some 60 steps' time on a CPU, 200 on a GPU: room for a machine that stalls, and for a step run again in halves.
_LEAST_SECONDS = 20.0
# The first engine here, whose first steps nothing is known of; and the end of all patience.
_MOST_SECONDS = 120.0
_TIMES_LONGER = 4.0


@dataclass(slots=True)
class Watchdog:
    """Knows the longest steps of every engine it was told of. `fixed_seconds`: the same patience with every step."""

    fixed_seconds: float | None = None
    _first_seconds: float | None = None  # the longest first step, once an engine has come through all of them
    _later_seconds: float = 0.0

    def learn(self, health: Health) -> None:
        """What an engine says of the steps it has finished."""
        if health.steps >= FIRST_STEPS:
            self._first_seconds = max(self._first_seconds or 0.0, health.first_steps_seconds)
        self._later_seconds = max(self._later_seconds, health.later_steps_seconds)

    def patience_seconds(self, health: Health) -> float:
        """How long the step that comes after this word of the engine may last."""
        if self.fixed_seconds is not None:
            return self.fixed_seconds
        longest = self._first_seconds if health.steps < FIRST_STEPS else self._later_seconds
        if longest is None:
            return _MOST_SECONDS
        return min(_MOST_SECONDS, max(_LEAST_SECONDS, _TIMES_LONGER * longest))
