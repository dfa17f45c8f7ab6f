"""From logits to the next token of each row, each by its own rules and its own random numbers."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from models.protocol import SamplingParams

_GREEDY_BELOW_TEMPERATURE = 1e-5  # dividing by less would overflow float32; the likeliest token wins anyway


class Sampler:
    """How one row chooses, and what it has seen so far.

    Its random numbers depend on the seed and the choice's index alone: neither on its neighbours, nor on the device.
    """

    def __init__(
        self, sampling: SamplingParams, choice: int, prompt_token_ids: Sequence[int], vocab_tokens: int, device: str
    ) -> None:
        self.sampling = sampling
        self.is_greedy = sampling.temperature < _GREEDY_BELOW_TEMPERATURE
        self._generator = None if self.is_greedy else _generator(sampling.seed, choice)
        self._repeats = sampling.repetition_penalty != 1.0
        self._counts_tokens = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self.adjusts = bool(self._repeats or self._counts_tokens or sampling.logit_bias)
        if self._repeats:
            self._seen = torch.zeros(vocab_tokens, dtype=torch.bool, device=device)  # prompt and generated
            self._seen[torch.tensor(prompt_token_ids, device=device)] = True
        if self._counts_tokens:
            self._counts = torch.zeros(vocab_tokens, device=device)  # generated only
        if sampling.logit_bias:
            self._biased = torch.tensor([token for token, _ in sampling.logit_bias], device=device)
            self._biases = torch.tensor([bias for _, bias in sampling.logit_bias], device=device)

    def adjust(self, logits: Tensor) -> None:
        """Apply penalties and biases in place; `logits` is (vocab,), float32.

        Repetition penalty as in CTRL (Keskar et al. 2019); the other two as OpenAI's API defines them.
        """
        if self._repeats:
            penalty = self.sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._seen, penalised, logits))
        if self._counts_tokens:
            logits -= self.sampling.presence_penalty * (self._counts > 0)
            logits -= self.sampling.frequency_penalty * self._counts
        if self.sampling.logit_bias:
            logits.index_add_(0, self._biased, self._biases)

    def note(self, token_id: int) -> None:
        """The row has taken this token."""
        if self._repeats:
            self._seen[token_id] = True
        if self._counts_tokens:
            self._counts[token_id] += 1

    def uniform(self) -> float:
        """The row's next random number, in [0, 1)."""
        return torch.rand((), generator=self._generator).item()


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token id of each row; `logits` is (rows, vocab) and may be overwritten."""
    logits = logits.float()
    for row, sampler in enumerate(samplers):
        if sampler.adjusts:
            sampler.adjust(logits[row])
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.is_greedy]
    if drawing:
        drawn = _draw(logits[drawing], [samplers[row] for row in drawing])
        for row, token_id in zip(drawing, drawn, strict=True):
            token_ids[row] = token_id
    for sampler, token_id in zip(samplers, token_ids, strict=True):
        sampler.note(token_id)
    return token_ids


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token per row by inverting the cumulative distribution, in vocabulary order, at the row's random number."""
    rules = [sampler.sampling for sampler in samplers]
    logits = logits / _column([rule.temperature for rule in rules], logits)
    if any(rule.top_k or rule.top_p < 1 for rule in rules):
        logits = _keep_top(logits, rules)
    probabilities = logits.softmax(dim=-1)
    if any(rule.min_p for rule in rules):
        floor = probabilities.amax(dim=-1, keepdim=True) * _column([rule.min_p for rule in rules], logits)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    cumulative = probabilities.double().cumsum(dim=-1)  # (rows, vocab); float32 would lose the tail of a vocabulary
    at = _column([sampler.uniform() for sampler in samplers], cumulative) * cumulative[:, -1:]
    # right=True finds the first token whose sum is above: one of probability 0 cannot be it
    token_ids: list[int] = torch.searchsorted(cumulative, at, right=True).squeeze(-1).tolist()
    return token_ids


def _keep_top(logits: Tensor, rules: Sequence[SamplingParams]) -> Tensor:
    """Only the `top_k` likeliest tokens, and of these the fewest whose probabilities reach `top_p` (nucleus)."""
    vocab_tokens = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_tokens, device=logits.device)
    ordered = ordered.masked_fill(rank >= _column([rule.top_k or vocab_tokens for rule in rules], rank), -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # with top_p off, rounding in the sum must not cut the tail
    reach = _column([rule.top_p if rule.top_p < 1 else torch.inf for rule in rules], before)
    ordered = ordered.masked_fill(before >= reach, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


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
