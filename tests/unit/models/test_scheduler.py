"""Which rows run, and how many tokens of each: policy without a model."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.blocks import BlockPool
from models.protocol import GenerationRequest, SamplingParams
from models.rows import Advance, Flight, Row
from models.scheduler import BlockScheduler, Plan, StepBudget, share

SIZE = 4


def flight(name: str, prompt: list[int], max_tokens: int = 4, n: int = 1, priority: int = 5) -> Flight:
    sampling = SamplingParams(max_tokens, n=n)
    return Flight(GenerationRequest(name, tuple(prompt), sampling, priority=priority), 0.0, lambda _: "")


@dataclass
class Bench:
    """A scheduler, and a stand-in for the model: what a row says next depends on what it said, and nothing else."""

    blocks: int = 20
    slots: int = 4
    tokens: int = 16
    reserved_tokens: int = 64
    pool: BlockPool = field(init=False)
    scheduler: BlockScheduler = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.blocks, SIZE)
        budget = StepBudget(self.tokens, self.tokens, target_seconds=1.0)
        self.scheduler = BlockScheduler(self.pool, budget, self.slots, self.reserved_tokens)

    def add(self, flight: Flight) -> Flight:
        for row in flight.rows:
            self.scheduler.add(row)
        return flight

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        self.steps += 1
        self.scheduler.done(plan.works)
        for work in plan.works:
            if work.chooses:
                work.row.take(Advance(work.row, work.tokens, (sum(work.row.sequence) % 3,)))
        self.scheduler.drop([work.row for work in plan.works if work.row.finish_reason])
        self.pool.check()
        return plan

    def cancel(self, flight: Flight) -> None:
        rows = [row for row in flight.rows if row.finish_reason is None]
        flight.end("cancelled", 0.0)
        self.scheduler.drop(rows)

    def finish(self) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.step()


def names(rows: list[Row]) -> list[str]:
    return [row.flight.request.id for row in rows]


def test_priority_goes_before_age() -> None:
    """A later request of a better priority is admitted first; equal ones in their order."""
    bench = Bench(slots=2)
    for name, priority in (("old", 5), ("older", 5), ("urgent", 0)):
        bench.add(flight(name, [1, 2], priority=priority))
    bench.step()
    assert names(bench.scheduler.running) == ["urgent", "old"]


def test_decoding_rows_never_wait_for_a_long_prompt() -> None:
    """In every step each decoding row gets its token, while the prompt goes on beside them."""
    bench = Bench(blocks=100, tokens=8)
    rows = [row for at in range(3) for row in bench.add(flight(f"d{at}", [at], max_tokens=30)).rows]
    bench.step()
    long = bench.add(flight("long", list(range(100)))).rows[0]
    while not long.token_ids:
        before = [len(row.token_ids) for row in rows]
        plan = bench.step()
        assert [len(row.token_ids) for row in rows] == [count + 1 for count in before]
        assert sum(work.tokens for work in plan.works) <= 3 + 32


def test_a_short_prompt_passes_a_long_one() -> None:
    """A prompt that needs more than a step leaves half of the room, so one that comes after it starts at once."""
    bench = Bench(blocks=100, tokens=64)
    bench.add(flight("long", list(range(300))))
    bench.step()
    short = bench.add(flight("short", list(range(400, 420)))).rows[0]
    bench.step()
    assert short.token_ids


@pytest.mark.parametrize(
    ("wanted", "room", "given"),
    [([5, 5], 20, [5, 5]), ([100, 10], 64, [54, 10]), ([100, 100, 100], 64, [40, 16, 8]), ([7], 4, [4]), ([], 9, [])],
)
def test_prompts_share_the_room(wanted: list[int], room: int, given: list[int]) -> None:
    """Nothing is left over that somebody wants, and the first gets at least half."""
    assert share(wanted, room) == given


def test_choices_of_one_request_compute_their_prompt_once() -> None:
    """The others wait for the first, then share its blocks and compute less than a block each."""
    bench = Bench(blocks=40, tokens=64)
    rows = bench.add(flight("n", list(range(18)), n=3)).rows
    assert [work.row for work in bench.step().works] == rows[:1]
    works = bench.step().works
    assert {work.row: work.tokens for work in works} == {rows[0]: 1, rows[1]: 2, rows[2]: 2}


def test_the_youngest_gives_way_and_ends_all_the_same() -> None:
    """Out of blocks, the last row of the lowest priority is computed again later, and says what it would have said."""
    wanted = {}
    for blocks, reserved in ((60, 64), (9, 0)):
        bench = Bench(blocks=blocks, reserved_tokens=reserved)
        flights = [bench.add(flight(str(at), [at, 7, 1, at], max_tokens=20)) for at in range(4)]
        bench.finish()
        wanted[blocks] = [row.token_ids for one in flights for row in one.rows]
        assert (bench.scheduler.preemptions > 0) == (blocks == 9)
    assert wanted[60] == wanted[9]


def test_the_budget_follows_the_time_a_step_takes() -> None:
    """Slow steps make it smaller, quick full ones larger, at once; after a lack of memory it stays below for good."""
    budget = StepBudget(128, 512, target_seconds=0.4)
    budget.observe(128, 0.8)
    assert budget.tokens == 64
    budget.observe(64, 0.2)
    assert budget.tokens == 115
    budget.observe(100, 0.1)  # it was not full, so it says nothing
    assert budget.tokens == 115
    budget.observe(115, 0.05)
    assert budget.tokens == 512
    assert budget.halve()
    budget.observe(budget.tokens, 0.1)
    assert budget.tokens == 256
    while budget.halve():
        pass
    assert budget.tokens == 1


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(8, 30), slots=st.integers(1, 6), tokens=st.integers(1, 40))
def test_random_loads_end_and_leave_no_block_behind(seed: int, blocks: int, slots: int, tokens: int) -> None:
    """Random arrivals, lengths, choices, priorities and cancels, in pools of every size.

    Every row that is not cancelled ends with all its tokens; the budget and the slots hold; in each step the row that
    comes first gets on, so none starves; afterwards every block is free or cached.
    """
    draw = random.Random(seed)
    bench = Bench(blocks=blocks, slots=slots, tokens=tokens, reserved_tokens=draw.choice([0, 8, 64]))
    longest = blocks * SIZE
    flights: list[Flight] = []
    cancelled = set()
    for at in range(draw.randint(1, 25)):
        prompt = [draw.randrange(2) for _ in range(draw.randint(1, longest - 1))]
        max_tokens = draw.randint(1, min(20, longest - len(prompt)))
        flights.append(bench.add(flight(str(at), prompt, max_tokens, draw.choice([1, 1, 3]), draw.randrange(10))))
        for _ in range(draw.randrange(4)):
            advance_and_check(bench)
        if draw.random() < 0.2:
            victim = draw.choice(flights)
            if not victim.is_over:
                bench.cancel(victim)
                cancelled.add(victim)
    while bench.scheduler.running or bench.scheduler.waiting:
        advance_and_check(bench)
    for one in flights:
        if one not in cancelled:
            assert all(len(row.token_ids) == one.request.sampling.max_tokens for row in one.rows)
    assert bench.pool.used == 0
    assert bench.scheduler.waiting == 0


def advance_and_check(bench: Bench) -> None:
    if not (bench.scheduler.running or bench.scheduler.waiting):
        return
    before = list(bench.scheduler.running)
    plan = bench.step()
    assert len(plan.works) <= bench.slots
    assert sum(work.tokens for work in plan.works if work.tokens > 1) <= bench.tokens
    assert len({work.row for work in plan.works}) == len(plan.works)
    worked = [work.row for work in plan.works]
    first = min(before + worked, key=lambda row: row.rank)  # it was running, or has just been admitted
    assert first in worked, "the first row must get on"
