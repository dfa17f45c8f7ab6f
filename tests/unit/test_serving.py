"""Workers for a bulk run: added for models that nobody serves, and only for those."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.serving import _Helper
from headrace.tellers import Silent
from jobs.errors import StoreUnavailable

PATIENCE_SECONDS = 20.0


@dataclass
class Fake:
    """A workforce that only notes what it is asked for."""

    served: set[str] = field(default_factory=set)
    started: list[str] = field(default_factory=list)
    reachable: bool = True
    checks: int = 0

    def models_served(self) -> set[str]:
        if not self.reachable:
            raise StoreUnavailable("away")
        return self.served

    def start(self, model: str) -> None:
        self.started.append(model)

    def check(self) -> None:
        self.checks += 1


@dataclass
class Scene:
    """A helper whose clock the test turns."""

    workforce: Fake = field(default_factory=Fake)
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.helper = _Helper(
            self.workforce,  # type: ignore[arg-type]
            ["kept"],
            PATIENCE_SECONDS,
            Silent(),
            lambda: self.now,
        )

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.helper.check()


def test_a_model_that_nobody_serves_gets_a_worker_at_once() -> None:
    """Once, however often one looks."""
    scene = Scene()
    scene.helper.serve("echo")
    scene.pass_time(100)
    assert scene.workforce.started == ["echo"]


def test_a_model_of_the_stack_that_is_up_gets_none() -> None:
    """The stack starts its own workers again, even if none is seen for long."""
    scene = Scene()
    scene.helper.serve("kept")
    scene.pass_time(100)
    assert scene.workforce.started == []


def test_a_served_model_gets_a_worker_once_its_own_is_gone_for_long() -> None:
    """A gap such as a restart leaves is waited out."""
    scene = Scene(Fake(served={"echo"}))
    scene.helper.serve("echo")
    scene.pass_time(100)
    scene.workforce.served = set()
    scene.pass_time(PATIENCE_SECONDS - 1)
    assert scene.workforce.started == []
    scene.workforce.served = {"echo"}
    scene.pass_time(5)
    scene.workforce.served = set()
    scene.pass_time(PATIENCE_SECONDS - 1)
    assert scene.workforce.started == []
    scene.pass_time(2)
    assert scene.workforce.started == ["echo"]


def test_while_the_store_is_away_nothing_is_concluded() -> None:
    """Neither serving nor looking fails, and no worker is started blindly."""
    scene = Scene(Fake(served={"echo"}))
    scene.workforce.reachable = False
    scene.helper.serve("echo")
    scene.pass_time(5)
    assert scene.workforce.started == []
    scene.workforce.reachable = True
    scene.pass_time(5)
    assert scene.workforce.started == []


def test_own_workers_are_looked_after_at_every_check() -> None:
    """Leases are looked up only every few seconds, children each time."""
    scene = Scene(Fake(served={"echo"}))
    for _ in range(5):
        scene.pass_time(0.1)
    assert scene.workforce.checks == 5
