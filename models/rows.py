"""A request inside an engine, and the rows it is computed in: one for each choice. Plain Python, no tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.blocks import Lease
from models.protocol import (
    Choice,
    Delta,
    Ended,
    Failure,
    FinishReason,
    GenerationRequest,
    Outcome,
    Timings,
    TokenLogprobs,
    Usage,
)
from models.text import TextStream

_UNFINISHED: dict[Outcome, FinishReason] = {"cancelled": "cancelled", "expired": "deadline", "failed": "error"}


@dataclass(eq=False, slots=True)
class Row:
    """One choice of a request, as a row of the engine's batch."""

    flight: "Flight"
    index: int
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of these tokens, if wanted
    finish_reason: FinishReason | None = None  # None while it runs or waits
    told_tokens: int = 0  # those that a Delta has carried
    # -- set by the scheduler --
    sequence: list[int] = field(init=False)  # prompt and generated tokens
    rank: tuple[int, int] = (0, 0)  # priority and arrival
    lease: Lease | None = None  # its blocks of the KV pool while it runs
    computed_tokens: int = 0  # how many of `sequence` have keys and values there

    def __post_init__(self) -> None:
        """It begins as its prompt."""
        self.sequence = list(self.flight.request.prompt_token_ids)

    @property
    def missing_tokens(self) -> int:
        """Tokens to put through the model before the next can be chosen; 1 while it decodes."""
        return len(self.sequence) - self.computed_tokens

    @property
    def tokens_to_come(self) -> int:
        """How many it may still write."""
        return self.flight.request.sampling.max_tokens - len(self.token_ids)

    @property
    def prompt_is_computed(self) -> bool:
        """Whether it once was; the row may have been preempted since."""
        return bool(self.token_ids) or self.computed_tokens >= len(self.flight.request.prompt_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of all its prompt's tokens are wanted: then none of them may come from the cache."""
        return self.index == 0 and self.flight.wants_prompt_logprobs

    def join(self, lease: Lease, cached_tokens: int) -> None:
        """It runs from here on, with these tokens known already. Those of the prompt count for its owner, once."""
        self.lease, self.computed_tokens = lease, cached_tokens
        if self.index == 0 and self.flight.started_at is None:
            self.flight.cached_tokens = cached_tokens

    def take(self, advance: "Advance") -> str:
        """Add a step's tokens; returns the text they settle. May finish the row."""
        taken, stopped = self._wanted(advance.token_ids)
        self.token_ids.extend(taken)
        self.sequence.extend(taken)
        self.logprobs.extend(advance.logprobs[: len(taken)])
        text = "" if advance.silent else self.stream.push(taken[:-1] if stopped else taken)
        if advance.ended or stopped or self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.flight.request.sampling.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self.stream.finish(cut=self.finish_reason == "length")
            self.finish_reason = "stop" if self.stream.stopped else self.finish_reason
        return text

    def _wanted(self, token_ids: Sequence[int]) -> tuple[Sequence[int], bool]:
        """The part of these tokens that fits, up to a stop token; and whether that ends them."""
        sampling = self.flight.request.sampling
        have = len(self.token_ids)
        token_ids = token_ids[: sampling.max_tokens - have]
        if sampling.stop_token_ids:
            for at, token_id in enumerate(token_ids):
                if token_id in sampling.stop_token_ids and have + at >= sampling.min_tokens:
                    return token_ids[: at + 1], True
        return token_ids, False

    @property
    def wanted_token_ids(self) -> tuple[int, ...]:
        """What its choice carries: every token, if the request wants them."""
        return tuple(self.token_ids) if self.flight.request.return_token_ids else ()

    def delta(self, text: str) -> Delta:
        """The event for this text, with the tokens since the last one."""
        told, self.told_tokens = self.told_tokens, len(self.token_ids)
        token_ids, logprobs = tuple(self.token_ids[told:]), tuple(self.logprobs[told:])
        return Delta(self.flight.request.id, self.index, text, token_ids, logprobs)


@dataclass(frozen=True, slots=True)
class Advance:
    """What one step did for one row."""

    row: Row
    processed_tokens: int  # that went through the model: the row's share of the step's time is in proportion
    token_ids: Sequence[int] = ()  # new ones
    ended: bool = False  # the model has no more to say
    silent: bool = False  # the new tokens are not text (EOS)
    logprobs: Sequence[TokenLogprobs] = ()  # of the new tokens, if wanted
    failure: Failure | None = None  # the row, and with it its request, cannot go on


class Flight:
    """One request from intake to its end. The engine's thread owns it; times are of the monotonic clock."""

    def __init__(self, request: GenerationRequest, now: float, decode: Callable[[Sequence[int]], str]) -> None:
        sampling = request.sampling
        self.request = request
        streams = [TextStream(decode, sampling.stop, sampling.min_tokens) for _ in range(sampling.n)]
        self.rows = [Row(self, index, stream) for index, stream in enumerate(streams)]
        self.prompt_logprobs: list[TokenLogprobs | None] = []  # as far as they are known
        self.submitted_at = now
        self.deadline_at = math.inf if request.deadline_seconds is None else now + request.deadline_seconds
        self.started_at: float | None = None  # set when a row joins its first step
        self.first_token_at: float | None = None
        self.cached_tokens = 0
        self.busy_seconds = 0.0
        self.detokenize_seconds = 0.0
        self.failure: Failure | None = None

    @property
    def is_over(self) -> bool:
        """Nothing is left to compute for it."""
        return self.failure is not None or all(row.finish_reason for row in self.rows)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Some are still to come: the prompt's positions must be computed, not taken from a cache."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.request.prompt_token_ids)

    def note_prompt_logprobs(self, start: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Those of the prompt's tokens from index `start` (at least 1) on; what is known already is passed over."""
        self.prompt_logprobs = self.prompt_logprobs or [None]
        known = len(self.prompt_logprobs) - start
        self.prompt_logprobs.extend(logprobs[known:])

    def end(self, outcome: Outcome, now: float) -> Ended:
        """Close it, with what it has. Rows still at work are finished by this."""
        for row in self.rows:
            row.finish_reason = row.finish_reason or _UNFINISHED.get(outcome, "cancelled")
        if self.started_at is None:
            return Ended(self.request.id, outcome, timings=self._timings(now), error=self.failure)
        return Ended(
            self.request.id,
            outcome,
            self._choices(),
            self._usage(),
            self._timings(now),
            self.failure,
            tuple(self.prompt_logprobs),
        )

    def _choices(self) -> tuple[Choice, ...]:
        return tuple(
            Choice(row.index, row.stream.text, row.wanted_token_ids, row.finish_reason or "error", tuple(row.logprobs))
            for row in self.rows
        )

    def _usage(self) -> Usage:
        generated = sum(len(row.token_ids) for row in self.rows)
        return Usage(len(self.request.prompt_token_ids), self.cached_tokens, generated)

    def _timings(self, now: float) -> Timings:
        """Queue, prefill and decode meet end to end: each begins where the one before ends."""
        started = now if self.started_at is None else self.started_at
        first_token = now if self.first_token_at is None else self.first_token_at
        return Timings(
            queue_seconds=started - self.submitted_at,
            prefill_seconds=first_token - started,
            decode_seconds=now - first_token,
            detokenize_seconds=self.detokenize_seconds,
            time_to_first_token_seconds=None if self.first_token_at is None else first_token - self.submitted_at,
            busy_seconds=self.busy_seconds,
        )
