"""What a model does on this machine: a seeded load of requests, put through its engine, and what came out of it.

The load, `mixed`, is also the one that `benchmarks/engine` puts through other engines. Those live in environments of
their own, so at import this needs the standard library only.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs.errors import HeadraceError

if TYPE_CHECKING:
    from jobs.settings import Settings
    from models.protocol import Ended, Engine, GenerationRequest

_SEED = 20_261_126


class BenchError(HeadraceError):
    """The model cannot be loaded, or did not answer; the message says why."""


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


@dataclass(frozen=True)
class Figures:
    """What `headrace bench` tells. Seconds are medians over requests unless a name says otherwise."""

    model: str
    quantization: str
    device: str
    rows: int  # computed together at most
    requests: int
    prompt_tokens: int
    output_tokens: int
    wall_seconds: float
    output_tokens_per_second: float
    tokens_per_second: float  # prompts counted too
    first_token_seconds: float  # from the submit of all requests at once: waiting for a free row included
    first_token_p95_seconds: float
    between_tokens_seconds: float  # of each request: from the first token to the last, over the tokens after the first
    between_tokens_p95_seconds: float
    alone_first_token_seconds: float  # of one request that has the model to itself
    alone_between_tokens_seconds: float


def measure(settings: Settings, model: str, *, quick: bool) -> Figures:
    """Load a model of the catalog and put the load through it. Raises `BenchError`, `UnknownModel`."""
    from models.engine import load_engine
    from models.prompt import load_prompt_format
    from models.protocol import EngineError
    from producer.validation import catalog_of

    spec = catalog_of(settings).get(model)
    try:
        engine = load_engine(spec)
        try:
            vocab_tokens = load_prompt_format(spec).vocab_tokens
            return bench(engine, vocab_tokens, engine.health().context_tokens, quick=quick)
        finally:
            engine.close()
    except EngineError as error:
        raise BenchError(str(error)) from error


def bench(engine: Engine, vocab_tokens: int, context_tokens: int, *, quick: bool) -> Figures:
    """Put the load through an engine that is idle; its lengths are cut to what the model's context holds."""
    prompt_tokens, output_tokens = ((16, 128), (8, 64)) if quick else ((16, 512), (8, 256))
    loads = mixed(
        16 if quick else 64,
        vocab_tokens,
        prompt_tokens=(min(16, context_tokens // 4), min(prompt_tokens[1], context_tokens // 2)),
        output_tokens=(min(8, context_tokens // 4), min(output_tokens[1], context_tokens // 2)),
    )
    serve(engine, [replace(loads[0], id="warm-up", salt="warm-up")])
    (alone,) = serve(engine, [replace(loads[0], id="alone", salt="alone")])
    began = time.perf_counter()
    ended = serve(engine, loads)
    return _figures(engine, ended, alone, time.perf_counter() - began)


def serve(engine: Engine, loads: Sequence[Load]) -> list[Ended]:
    """Submit all at once and step until the last has ended. Raises `EngineError` if one fails."""
    from models.protocol import Ended, EngineError

    for one in loads:
        engine.submit(as_request(one))
    ended = []
    while engine.has_work():
        ended += [event for event in engine.step() if isinstance(event, Ended)]
    for event in ended:
        if event.outcome != "succeeded":
            raise EngineError(f"{event.id} {event.outcome}: {event.error}")
    return ended


def as_request(load: Load) -> GenerationRequest:
    """The load in the engine's words."""
    from models.protocol import GenerationRequest, SamplingParams

    sampling = SamplingParams(load.max_tokens, temperature=0.0, ignore_eos=True)
    return GenerationRequest(load.id, load.prompt_token_ids, sampling, cache_salt=load.salt)


def _figures(engine: Engine, ended: Sequence[Ended], alone: Ended, seconds: float) -> Figures:
    health = engine.health()
    prompt_tokens = sum(event.usage.prompt_tokens for event in ended)
    output_tokens = sum(event.usage.completion_tokens for event in ended)
    first = [event.timings.time_to_first_token_seconds or 0.0 for event in ended]
    between = [_between_tokens_seconds(event) for event in ended]
    return Figures(
        model=health.model,
        quantization=health.quantization,
        device=health.device,
        rows=health.slots,
        requests=len(ended),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        wall_seconds=seconds,
        output_tokens_per_second=output_tokens / seconds,
        tokens_per_second=(prompt_tokens + output_tokens) / seconds,
        first_token_seconds=percentile(first, 0.5),
        first_token_p95_seconds=percentile(first, 0.95),
        between_tokens_seconds=percentile(between, 0.5),
        between_tokens_p95_seconds=percentile(between, 0.95),
        alone_first_token_seconds=alone.timings.time_to_first_token_seconds or 0.0,
        alone_between_tokens_seconds=_between_tokens_seconds(alone),
    )


def _between_tokens_seconds(ended: Ended) -> float:
    return ended.timings.decode_seconds / max(1, ended.usage.completion_tokens - 1)
