"""The load `mixed`, warming up, and what is told about answers. Standard library only."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engine.serving import Answer, Serving, Setup
from headrace.bench import Load, mixed

VOCAB_TOKENS = 32_000
FIRST_WORD = 300  # below lie special tokens and bytes
_SINGLE_REQUESTS = 8  # one at a time, more would take minutes and say no more


def run(serving: Serving, setup: Setup, *, quick: bool) -> Mapping[str, Any]:
    """64 requests at once, each different, of the lengths of practice."""
    loads = mixed_loads(quick=quick)
    warm_up(serving)
    if setup.width == 1:
        loads = loads[:_SINGLE_REQUESTS]
    began = time.perf_counter()
    answers = list(serving.serve(loads, nothing))
    return figures(loads, answers, time.perf_counter() - began)


def mixed_loads(*, quick: bool) -> list[Load]:
    """The requests of `mixed`."""
    if quick:
        return mixed(16, VOCAB_TOKENS, prompt_tokens=(16, 128), output_tokens=(8, 64), first_token_id=FIRST_WORD)
    return mixed(64, VOCAB_TOKENS, first_token_id=FIRST_WORD)


def warm_up(serving: Serving) -> None:
    """Kernels are chosen and memory is touched on first use."""
    loads = mixed(4, VOCAB_TOKENS, prompt_tokens=(32, 64), output_tokens=(4, 8), first_token_id=FIRST_WORD)
    warm = [Load(f"warm-{number}", one.prompt_token_ids, one.max_tokens, "warm") for number, one in enumerate(loads)]
    list(serving.serve(warm, nothing))


def figures(loads: Sequence[Load], answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Counts and rates. Raises `ValueError` if an answer is missing or has another length than was asked for."""
    asked = {one.id: one.max_tokens for one in loads}
    given = {answer.id: len(answer.token_ids) for answer in answers}
    if asked != given:
        wrong = {one: (asked.get(one), given.get(one)) for one in asked | given if asked.get(one) != given.get(one)}
        raise ValueError(f"answers of other lengths than asked for (asked, given): {wrong}")
    output_tokens = sum(given.values())
    return {
        "requests": len(loads),
        "prompt_tokens": sum(len(one.prompt_token_ids) for one in loads),
        "output_tokens": output_tokens,
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": round(output_tokens / seconds, 2),
    }


def nothing(_: Answer) -> Sequence[Load]:
    """Nothing follows."""
    return ()
