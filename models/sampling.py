"""From logits to the next token of each row, each by its own rules and its own random numbers.

    token_ids = sample(logits, samplers)                  # and each sampler has noted its token
    told = logprobs(logits, token_ids, [sampler.sampling.logprobs for sampler in samplers])

A row's logits go through repetition penalty, presence and frequency penalty, bias, the ban on ends before `min_tokens`,
structure; then the likeliest token is taken, or one is drawn after temperature, top-k, top-p and min-p.
"""

import hashlib
from array import array
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from models.protocol import Failure, SamplingParams, TokenLogprobs

_GREEDY_BELOW_TEMPERATURE = 1e-5  # dividing by less would overflow float32; the likeliest token wins anyway
_LEAST_LOGPROB = -9_999.0  # as OpenAI's API has it
_NUCLEUS_TOKENS = 1_024  # looked at first for top-p: the nucleus is rarely larger, and sorting a vocabulary is dear


class Matcher(Protocol):
    """Follows one row's text through a structure. `models.grammar` makes them."""

    error: str | None  # why it cannot go on

    @property
    def is_complete(self) -> bool:
        """Whether the text satisfies the structure, and nothing may follow but EOS."""

    def allowed(self) -> bytes:
        """Which tokens may come next, one bit each, lowest first; at least one is set. Sets `error` if that fails."""

    def advance(self, token_id: int) -> None:
        """This token has come. Sets `error` if it must not."""


class Tally:
    """Which tokens a row has seen, and how often, in arrays of the same order: a step copies them, counts nothing."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self._at: dict[int, int] = {}
        self.token_ids = array("q")
        self.counts = array("f")
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Once more."""
        at = self._at.setdefault(token_id, len(self.token_ids))
        if at == len(self.token_ids):
            self.token_ids.append(token_id)
            self.counts.append(0.0)
        self.counts[at] += 1.0


class Sampler:
    """How one row chooses, and what it has seen so far. It stays with its row, even while that is not computed.

    Its random numbers depend on the seed and the choice's index alone: neither on its neighbours, nor on the device.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        choice: int,
        prompt_token_ids: Sequence[int],
        vocab_tokens: int,
        device: str,
        *,
        eos_token_ids: Collection[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        del vocab_tokens, device  # nothing here is as large as a vocabulary, or lies on the device
        self.sampling = sampling
        self.is_greedy = sampling.temperature < _GREEDY_BELOW_TEMPERATURE
        self.matcher = matcher
        self.ended = False  # the row has nothing more to say
        self.silent = False  # its last token is no text: EOS
        self.failure: Failure | None = None  # why the row cannot go on
        self.generated = 0
        self._generator = None if self.is_greedy else _generator(sampling.seed, choice)
        self._eos_token_ids = frozenset() if sampling.ignore_eos else frozenset(eos_token_ids)
        counts = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self.seen = Tally(prompt_token_ids) if sampling.repetition_penalty != 1.0 else None  # prompt and generated
        self.written = Tally() if counts else None  # generated only
        self.ends = array("q", sorted(self._eos_token_ids.union(sampling.stop_token_ids)))

    @property
    def may_end(self) -> bool:
        """Whether the next token may be EOS or a stop token."""
        return self.generated >= self.sampling.min_tokens

    @property
    def takes_likeliest(self) -> bool:
        """Greedy, and the logits are taken as the model gives them: nearly all that a step costs can be saved."""
        touched = self.seen or self.written or self.sampling.logit_bias or self.matcher
        return self.is_greedy and not touched and (self.may_end or not self.ends)

    def note(self, token_id: int) -> None:
        """The row has taken this token."""
        self.generated += 1
        if self.seen:
            self.seen.add(token_id)
        if self.written:
            self.written.add(token_id)
        self.silent = token_id in self._eos_token_ids
        if self.matcher and not self.ended:
            self._follow(self.matcher, token_id)
        self.ended = self.ended or self.silent

    def _follow(self, matcher: Matcher, token_id: int) -> None:
        if matcher.error is None and not self.silent:
            matcher.advance(token_id)
        if matcher.error is not None:
            message = f"{self.sampling.structure.field if self.sampling.structure else 'structure'}: {matcher.error}"
            self.failure = Failure("structure_failed", message, retryable=False)
        self.ended = matcher.is_complete or self.failure is not None

    def uniform(self) -> float:
        """The row's next random number, in [0, 1)."""
        return torch.rand((), generator=self._generator).item()


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token id of each row, which its sampler notes; `logits` is (rows, vocab) and stays as it is."""
    busy = [row for row, sampler in enumerate(samplers) if not sampler.takes_likeliest]
    if len(busy) < len(samplers):
        token_ids = logits.argmax(dim=-1)  # (rows,); in the model's own type: converting would cost more than this
    else:
        token_ids = torch.empty(len(samplers), dtype=torch.int64, device=logits.device)
    if busy:
        token_ids[busy] = _choose(logits[busy].float(), [samplers[row] for row in busy])
    chosen: list[int] = token_ids.tolist()
    for sampler, token_id in zip(samplers, chosen, strict=True):
        sampler.note(token_id)
    return chosen


def logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """What the model itself thought of each row's token, and its `counts` likeliest; None for a row without a count.

    `logits` is (rows, vocab), as the model gave it: of generated tokens, or of a prompt's positions and the tokens that
    follow them there. Costs nothing if all counts are None.
    """
    told: list[TokenLogprobs | None] = [None] * len(counts)
    asked = [(row, count) for row, count in enumerate(counts) if count is not None]
    if not asked:
        return told
    rows = [row for row, _ in asked]
    picked = (logits if len(rows) == len(logits) else logits[rows]).float()
    own = torch.tensor([token_ids[row] for row in rows], device=logits.device).unsqueeze(-1)
    top = picked.topk(min(max(count for _, count in asked), picked.shape[-1]), dim=-1)
    values = torch.cat([picked.gather(-1, own), top.values], dim=-1) - picked.logsumexp(dim=-1, keepdim=True)
    # (rows asked, 1 + most); in double, so that they are short in JSON, which has no infinity either
    values = values.double().clamp(min=_LEAST_LOGPROB).round(decimals=6)
    for (row, count), own_id, ids, (value, *others) in zip(
        asked, own.squeeze(-1).tolist(), top.indices.tolist(), values.tolist(), strict=True
    ):
        told[row] = TokenLogprobs(own_id, value, tuple(zip(ids[:count], others[:count], strict=True)))
    return told


def _choose(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """The next token of each row: (rows,); overwrites `logits` (rows, vocab), float32."""
    _adjust(logits, samplers)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.is_greedy]
    if len(drawing) == len(samplers):
        return _draw(logits, samplers)
    token_ids = logits.argmax(dim=-1)
    if drawing:
        token_ids[drawing] = _draw(logits[drawing], [samplers[row] for row in drawing])
    return token_ids


# == adjusting ==================================================================================================


def _adjust(logits: Tensor, samplers: Sequence[Sampler]) -> None:
    """Apply penalties, biases and bans in place, all rows at once; `logits` is (rows, vocab), float32, contiguous.

    Repetition penalty as in CTRL (Keskar et al. 2019); the other two as OpenAI's API defines them.
    """
    repeats, counts, biased, barred = _Places(logits), _Places(logits), _Places(logits), _Places(logits)
    for row, sampler in enumerate(samplers):
        rules = sampler.sampling
        if sampler.seen:
            repeats.add(
                row, sampler.seen.token_ids, array("f", [rules.repetition_penalty]) * len(sampler.seen.token_ids)
            )
        if sampler.written:
            lost = [rules.presence_penalty + rules.frequency_penalty * count for count in sampler.written.counts]
            counts.add(row, sampler.written.token_ids, lost)
        if rules.logit_bias:
            biased.add(row, *zip(*dict(rules.logit_bias).items(), strict=True))
        if not sampler.may_end:
            barred.add(row, sampler.ends, [0.0] * len(sampler.ends))
    repeats.change(lambda old, penalty: torch.where(old > 0, old / penalty, old * penalty))
    counts.change(lambda old, lost: old - lost)
    biased.change(lambda old, bias: old + bias)
    barred.change(lambda old, _: torch.full_like(old, -torch.inf))
    _keep_allowed(logits, samplers)


class _Places:
    """Some tokens of some rows, each with a number, to be changed in one operation."""

    def __init__(self, logits: Tensor) -> None:
        self._flat = logits.view(-1)
        self._vocab_tokens = logits.shape[-1]
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._token_ids = array("q")
        self._numbers = array("f")

    def add(self, row: int, token_ids: Sequence[int], numbers: Sequence[float]) -> None:
        """Tokens of a row, each at most once."""
        self._rows.append(row)
        self._lengths.append(len(token_ids))
        self._token_ids.extend(token_ids)
        self._numbers.extend(numbers)

    def change(self, new: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace each place's logit by what `new` makes of it and of the place's number."""
        if not self._token_ids:
            return
        rows = torch.tensor(self._rows).repeat_interleave(torch.tensor(self._lengths))
        at = (rows * self._vocab_tokens + torch.frombuffer(self._token_ids, dtype=torch.int64)).to(self._flat.device)
        numbers = torch.frombuffer(self._numbers, dtype=torch.float32).to(self._flat.device)
        self._flat[at] = new(self._flat[at], numbers)


def _keep_allowed(logits: Tensor, samplers: Sequence[Sampler]) -> None:
    """In rows with a structure, only the tokens that may come next."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.matcher and not sampler.ended]
    masks = [matcher.allowed() for row in rows if (matcher := samplers[row].matcher)]
    if not masks:
        return
    bits = torch.frombuffer(bytearray().join(masks), dtype=torch.uint8).view(len(rows), -1)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (bits.to(logits.device).unsqueeze(-1) >> shifts & 1).bool().flatten(1)  # (rows, 8 x bytes)
    missing = logits.shape[-1] - allowed.shape[-1]  # a model's vocabulary may be larger than its tokenizer's
    allowed = torch.nn.functional.pad(allowed, (0, missing))  # a negative number cuts
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)


# == drawing ====================================================================================================


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """One token per row by inverting the cumulative distribution, in vocabulary order, at the row's random number."""
    rules = [sampler.sampling for sampler in samplers]
    if any(rule.temperature != 1.0 for rule in rules):
        logits = logits / _column([rule.temperature for rule in rules], logits)
    cumulative = _keep_top(logits, rules).softmax(dim=-1).double().cumsum(dim=-1)  # float32 would lose the tail
    at = _column([sampler.uniform() for sampler in samplers], cumulative) * cumulative[:, -1:]
    # right=True finds the first token whose sum is above: one of probability 0 cannot be it
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1)


def _keep_top(logits: Tensor, rules: Sequence[SamplingParams]) -> Tensor:
    """Only the tokens that top-k, top-p and min-p leave, each applied to what the one before left.

    The `top_k` likeliest; the fewest whose probabilities reach `top_p` (nucleus); those at least `min_p` times as
    likely as the likeliest. Equally likely tokens stay or go together: it does not matter how a device sorts them.
    """
    floor = logits.new_full((len(rules), 1), -torch.inf)  # what lies below is cut
    cut = [row for row, rule in enumerate(rules) if rule.top_k or rule.top_p < 1]
    if cut:
        floor[cut] = _floor(logits[cut] if len(cut) < len(rules) else logits, [rules[row] for row in cut])
    if any(rule.min_p for rule in rules):
        likeliest = logits.amax(dim=-1, keepdim=True)
        floor = torch.maximum(floor, likeliest + _column([rule.min_p for rule in rules], logits).log())
    elif not cut:
        return logits
    return logits.masked_fill(logits < floor, -torch.inf)


def _floor(logits: Tensor, rules: Sequence[SamplingParams]) -> Tensor:
    """The lowest logit that top-k and top-p leave in each row: (rows, 1)."""
    vocab_tokens = logits.shape[-1]
    wanted = max(_NUCLEUS_TOKENS, *(rule.top_k for rule in rules), 0)
    while True:
        width = min(wanted, vocab_tokens)
        values = logits.topk(width, dim=-1).values  # descending
        rank = torch.arange(width, device=logits.device)
        kept = values.masked_fill(rank >= _column([rule.top_k or width for rule in rules], rank), -torch.inf)
        whole = _column([not rule.top_k for rule in rules], rank).bool()
        total = torch.where(whole, logits.logsumexp(-1, keepdim=True), kept.logsumexp(-1, keepdim=True))
        probabilities = (kept - total).exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        # with top_p off, rounding in the sum must not cut the tail
        reach = _column([rule.top_p if rule.top_p < 1 else torch.inf for rule in rules], before)
        inside = (before < reach) & kept.isfinite()
        open_ended = whole & inside[:, -1:]  # the nucleus may go on behind what was looked at
        if width == vocab_tokens or not open_ended.any():
            return values.gather(-1, inside.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
        wanted = vocab_tokens


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _generator(seed: int | None, choice: int) -> torch.Generator:
    """On the CPU, so that a seed gives the same numbers everywhere."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:  # a hash, so that choice 1 of seed 7 is not choice 0 of seed 8
        digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "big"))
    return generator
