"""Which rows are computed in the next step, and how many tokens of each. Plain Python, no tensors.

Continuous batching (Orca, Yu et al. 2022) with chunked prefill (Sarathi, Agrawal et al. 2024): every row that decodes
gets its one token in every step; what the step's token budget leaves over goes to prompts, oldest first. When blocks
run out, the youngest row of the lowest priority gives its own back and is computed again later ("preemption by
recompute", vLLM, Kwon et al. 2023); what of it is still cached then is not computed twice.
"""

import bisect
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from models.blocks import BlockPool, Lease
from models.rows import Row

_RESERVED_TOKENS = 64  # room for output that a row must find to be admitted: preempting costs more than waiting
_LEAST_PREFILL_TOKENS = 32  # of a step: prompts get on even when decoding rows fill the budget


@dataclass(frozen=True, slots=True)
class Work:
    """A step's part in one row: tokens [first, first + tokens) of it go through the model."""

    row: Row
    first: int
    tokens: int

    @property
    def chooses(self) -> bool:
        """Whether it reaches the row's last token, so that the next one can be chosen."""
        return self.first + self.tokens == len(self.row.sequence)

    @property
    def outputs(self) -> int:
        """After how many of its tokens, the last ones, logits are wanted."""
        if self.row.wants_prompt_logprobs:
            return self.tokens
        return int(self.chooses)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Rows that decode come first."""

    works: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks to copy before it, (from, to)


class Scheduler(Protocol):
    """Holds the rows that have not ended."""

    def add(self, row: Row) -> None:
        """A new row; it waits."""

    def drop(self, rows: Sequence[Row]) -> None:
        """These rows have ended, their `finish_reason` says how: forget them. Once for each row."""

    def plan(self) -> Plan:
        """The next step. Rows leave the waiting ones here, by priority, then by age."""

    def done(self, works: Sequence[Work]) -> None:
        """These parts of the plan were computed."""

    @property
    def running(self) -> Sequence[Row]:
        """Rows that take part in steps."""

    @property
    def waiting(self) -> int:
        """How many rows wait."""


class Queue:
    """Waiting rows by priority, then by age. One that ended while it waited is skipped."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Row]] = []
        self._ended = 0

    def __len__(self) -> int:
        return len(self._heap) - self._ended

    def push(self, row: Row) -> None:
        """Also back: its place is that of its arrival."""
        heapq.heappush(self._heap, (*row.rank, row))

    def pop(self) -> Row | None:
        """The next that has not ended."""
        while self._heap:
            row = heapq.heappop(self._heap)[-1]
            if row.finish_reason is None:
                return row
            self._ended -= 1
        return None

    def note_ended(self, rows: int) -> None:
        """So many of the rows in here have ended."""
        self._ended += rows
        if self._ended > len(self):
            self._heap = [entry for entry in self._heap if entry[-1].finish_reason is None]
            heapq.heapify(self._heap)
            self._ended = 0


class SlotScheduler:
    """Without a KV pool: rows join while a slot is free, and each runs in every step (echo)."""

    def __init__(self, slots: int) -> None:
        self.running: list[Row] = []  # replaced, never changed: `health` reads it from another thread
        self._slots = slots
        self._queue = Queue()
        self._arrivals = itertools.count()

    @property
    def waiting(self) -> int:
        """See `Scheduler`."""
        return len(self._queue)

    def add(self, row: Row) -> None:
        """See `Scheduler`."""
        row.rank = (row.flight.request.priority, next(self._arrivals))
        self._queue.push(row)

    def drop(self, rows: Sequence[Row]) -> None:
        """See `Scheduler`."""
        before = len(self.running)
        self.running = [row for row in self.running if row.finish_reason is None]
        self._queue.note_ended(len(rows) - (before - len(self.running)))

    def plan(self) -> Plan:
        """See `Scheduler`."""
        joining: list[Row] = []
        while len(self.running) + len(joining) < self._slots and (row := self._queue.pop()):
            joining.append(row)
        if joining:
            self.running = [*self.running, *joining]
        return Plan([Work(row, 0, len(row.sequence)) for row in self.running])

    def done(self, works: Sequence[Work]) -> None:
        """See `Scheduler`."""


class StepBudget:
    """How many tokens a step may hold, so that it lasts about as long as it should.

    A long step keeps decoding rows and cancelled ones waiting; a short one wastes its fixed costs.
    """

    def __init__(
        self, tokens: int, most_tokens: int, target_seconds: float, least_tokens: int = _LEAST_PREFILL_TOKENS
    ) -> None:
        self.tokens = tokens
        self._most = most_tokens
        self._least = least_tokens
        self._target_seconds = target_seconds

    def observe(self, tokens: int, seconds: float) -> None:
        """A step over so many tokens took so long."""
        # A step has fixed costs too, so this is less than what would fit: there is no need to creep up to it.
        fitting = int(min(self._most, self.tokens * max(0.5, 0.9 * self._target_seconds / max(seconds, 1e-9))))
        if seconds > self._target_seconds:
            self.tokens = max(min(self._least, self.tokens), fitting)
        elif tokens >= self.tokens and seconds < 0.7 * self._target_seconds:
            self.tokens = fitting

    def halve(self) -> bool:
        """Memory did not suffice: never so many again. False if it cannot be less."""
        if self.tokens <= 1:
            return False
        self.tokens = self._most = self.tokens // 2
        return True


class BlockScheduler:
    """Rows over a KV pool."""

    def __init__(
        self, pool: BlockPool, budget: StepBudget, slots: int, reserved_tokens: int = _RESERVED_TOKENS
    ) -> None:
        self.running: list[Row] = []  # in the order of their rank; replaced, never changed: `health` reads it
        self.preemptions = 0
        self.budget = budget
        self.reserved_tokens = reserved_tokens
        self._pool = pool
        self._slots = slots
        self._gave_way = False  # a row did, in the last plan
        self._copies: dict[Row, tuple[int, int]] = {}  # that rows need that joined in this plan
        self._queue = Queue()
        self._arrivals = itertools.count()

    @property
    def waiting(self) -> int:
        """See `Scheduler`."""
        return len(self._queue)

    def add(self, row: Row) -> None:
        """See `Scheduler`."""
        row.rank = (row.flight.request.priority, next(self._arrivals))
        self._queue.push(row)

    def drop(self, rows: Sequence[Row]) -> None:
        """See `Scheduler`."""
        waiting = 0
        for row in rows:
            if row.lease:
                self._give_back(row, row.lease)
            else:
                waiting += 1
        self._queue.note_ended(waiting)
        self.running = [row for row in self.running if row.finish_reason is None]

    def plan(self) -> Plan:
        """See `Scheduler`."""
        self._copies = {}
        if not (self._gave_way and self.running):  # who had to give way must not take the room back at once
            self._admit()
        preemptions = self.preemptions
        works = []
        for row, tokens in self._shares():
            if tokens and row.lease and self._make_room(row, row.lease, row.computed_tokens + tokens):
                works.append(Work(row, row.computed_tokens, tokens))
        self._gave_way = self.preemptions > preemptions
        return Plan(works, list(self._copies.values()))

    def done(self, works: Sequence[Work]) -> None:
        """See `Scheduler`."""
        for work in works:
            row = work.row
            row.computed_tokens = work.first + work.tokens
            if row.lease and row.computed_tokens // self._pool.block_tokens > len(row.lease.nodes):
                self._pool.publish(row.lease, row.sequence[: row.computed_tokens])

    def _shares(self) -> list[tuple[Row, int]]:
        """Tokens for each running row, in the order of their rank: its one to those that decode, the rest to prompts.

        A prompt that needs more than a step leaves half of the room to the others.
        """
        prompts = [row for row in self.running if row.missing_tokens > 1]
        left = self.budget.tokens - (len(self.running) - len(prompts))
        room = max(left, min(self.budget.tokens, _LEAST_PREFILL_TOKENS))
        shares = dict(zip(prompts, share([row.missing_tokens for row in prompts], room), strict=True))
        return [(row, shares.get(row, 1)) for row in self.running]

    def _make_room(self, row: Row, lease: Lease, tokens: int) -> bool:
        """Blocks for so many tokens, if need be from rows that come later; False if it is the last and gave way."""
        while not self._pool.grow(lease, tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is row:
                return False
        return True

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self.running = self.running[:-1]
        lease = row.lease
        assert lease is not None
        if self._copies.pop(row, None):  # what it would have copied is not there yet
            row.computed_tokens = len(lease.nodes) * self._pool.block_tokens
        self._give_back(row, lease)
        self._queue.push(row)

    def _give_back(self, row: Row, lease: Lease) -> None:
        self._pool.release(lease, row.sequence[: row.computed_tokens])
        row.lease, row.computed_tokens = None, 0

    def _admit(self) -> None:
        """Let rows join while there are slots, and blocks for what they have and some of what they will write."""
        deferred = []
        promised = sum(self._lacking(row, row.lease) for row in self.running if row.lease)
        while len(self.running) < self._slots and (row := self._queue.pop()):
            if not _prompt_is_due(row):
                deferred.append(row)
                continue
            match = self._pool.match(row.flight.request.cache_salt, () if row.wants_prompt_logprobs else row.sequence)
            promised += self._lacking(row, match.lease)
            if promised > self._pool.available:
                self._pool.release(match.lease, ())
                deferred.append(row)
                break
            row.join(match.lease, match.cached_tokens)
            if match.copy:
                self._copies[row] = match.copy
            self.running = _insert(self.running, row)
        for row in deferred:
            self._queue.push(row)

    def _lacking(self, row: Row, lease: Lease) -> int:
        """Blocks that a row has not got yet, for its tokens and some more."""
        tokens = len(row.sequence) + min(self.reserved_tokens, row.tokens_to_come)
        return max(0, self._pool.blocks_for(tokens) - len(lease.blocks))


def share(wanted: Sequence[int], room: int) -> list[int]:
    """How many tokens each prompt gets. The first gets at least half, so none starves; together they use the room."""
    given = []
    for tokens in wanted:
        given.append(tokens if tokens <= room else room - room // 2)
        room -= given[-1]
    for at, tokens in enumerate(wanted):
        more = min(tokens - given[at], room)
        given[at] += more
        room -= more
    return given


def _prompt_is_due(row: Row) -> bool:
    """Choices after the first wait until it has computed the prompt they have in common."""
    first = row.flight.rows[0]
    return row is first or first.finish_reason is not None or first.prompt_is_computed


def _insert(rows: Sequence[Row], row: Row) -> list[Row]:
    at = bisect.bisect(rows, row.rank, key=lambda other: other.rank)
    return [*rows[:at], row, *rows[at:]]
