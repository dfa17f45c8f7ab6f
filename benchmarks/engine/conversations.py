"""Conversations: each turn's prompt is the whole talk so far and something new. Standard library only.

With reuse, only what is new should be computed. Without it, each turn has a salt of its own, and for engines that know
no salts, prefix caching is off.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.engine.mixed import FIRST_WORD, VOCAB_TOKENS, figures, nothing, warm_up
from benchmarks.engine.serving import Answer, Serving, Setup
from headrace.bench import Load, random_tokens

_SEED = 6


@dataclass(frozen=True)
class Shape:
    """How many and how long."""

    conversations: int = 8
    turns: int = 6
    new_tokens: int = 60  # of the prompt, in each turn
    output_tokens: int = 48


class Conversations:
    """The talks as they go on: gives the next turn when one has been answered."""

    def __init__(self, shape: Shape, *, reuse: bool) -> None:
        self.loads: list[Load] = []  # all that were asked so far
        self._shape = shape
        self._reuse = reuse
        self._rng = random.Random(_SEED)
        self._prompts: dict[str, tuple[int, ...]] = {}

    def begin(self) -> list[Load]:
        """The first turns."""
        return [self._turn(conversation, 0, ()) for conversation in range(self._shape.conversations)]

    def then(self, answer: Answer) -> Sequence[Load]:
        """The turn after this answer."""
        conversation, turn = map(int, answer.id.split("-"))
        if turn + 1 == self._shape.turns:
            return ()
        return [self._turn(conversation, turn + 1, self._prompts[answer.id] + answer.token_ids)]

    def _turn(self, conversation: int, turn: int, history: tuple[int, ...]) -> Load:
        name = f"{conversation}-{turn}"
        new = random_tokens(self._rng, self._shape.new_tokens, VOCAB_TOKENS, FIRST_WORD)
        self._prompts[name] = history + new
        salt = "first tenant" if self._reuse else name
        self.loads.append(Load(name, history + new, self._shape.output_tokens, salt))
        return self.loads[-1]


def run(serving: Serving, setup: Setup, *, quick: bool) -> Mapping[str, Any]:
    """All conversations at once, the turns of each one after the other."""
    shape = Shape(conversations=2, turns=3) if quick else Shape()
    talks = Conversations(shape, reuse=setup.reuse)
    warm_up(serving)
    began = time.perf_counter()
    answers = list(serving.serve(talks.begin(), talks.then))
    seconds = time.perf_counter() - began
    counted = figures(talks.loads, answers, seconds)
    return {**counted, **_computed(talks.loads, answers, shape), **_second_tenant(serving, talks.loads)}


def _computed(loads: Sequence[Load], answers: Sequence[Answer], shape: Shape) -> dict[str, Any]:
    """Prompt tokens that went through the model, over those that were new: 1 is the least."""
    cached = [answer.cached_tokens for answer in answers]
    if None in cached:
        return {}
    computed = sum(len(one.prompt_token_ids) for one in loads) - sum(tokens or 0 for tokens in cached)
    new = len(loads) * shape.new_tokens
    return {"computed_tokens": computed, "new_tokens": new, "computed_over_new": round(computed / new, 4)}


def _second_tenant(serving: Serving, loads: Sequence[Load]) -> dict[str, Any]:
    """Ask the last prompts again under another salt, if the engine knows salts: nothing may come from the cache."""
    if not serving.knows_salts:
        return {}
    last = {one.id.partition("-")[0]: one for one in loads}
    again = [Load(f"again-{one.id}", one.prompt_token_ids, 1, "second tenant") for one in last.values()]
    cached = sum(answer.cached_tokens or 0 for answer in serving.serve(again, nothing))
    return {"second_tenant_cached_tokens": cached}
