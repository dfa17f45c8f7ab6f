"""What a model does on this machine: a seeded load of requests, put through its engine, and what came out of it.

The load, `mixed`, is also the one that `benchmarks/engine` puts through other engines. At import this needs the
standard library only: those run in environments of their own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

_SEED = 20_261_126


@dataclass(frozen=True, slots=True)
class Load:
    """One request of a load. Greedy, and goes on to `max_tokens` whatever the model says."""

    id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    salt: str = "local"  # requests with equal salts may share cached keys and values


def mixed(
    requests: int,
    vocab_tokens: int,
    *,
    prompt_tokens: tuple[int, int] = (16, 512),
    output_tokens: tuple[int, int] = (8, 256),
    first_token_id: int = 0,
) -> list[Load]:
    """Requests of random tokens, no two alike, lengths log-uniform in these bounds. The same at every call."""
    rng = random.Random(_SEED)  # noqa: S311  no secret
    return [
        Load(
            f"mixed-{number}",
            random_tokens(rng, log_uniform(rng, prompt_tokens), vocab_tokens, first_token_id),
            log_uniform(rng, output_tokens),
        )
        for number in range(requests)
    ]


def log_uniform(rng: random.Random, bounds: tuple[int, int]) -> int:
    """As many values between 16 and 32 as between 256 and 512: what lengths in practice look like."""
    low, high = bounds
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def random_tokens(rng: random.Random, tokens: int, vocab_tokens: int, first_token_id: int = 0) -> tuple[int, ...]:
    """Token ids in [first_token_id, vocab_tokens)."""
    return tuple(rng.randrange(first_token_id, vocab_tokens) for _ in range(tokens))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
