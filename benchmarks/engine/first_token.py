"""How long a short request waits for its first token while others decode and a long prompt is being prefilled."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.engine.mixed import FIRST_WORD, VOCAB_TOKENS, warm_up
from benchmarks.engine.serving import Serving, Setup
from headrace.bench import random_tokens

_SEED = 4_000
_DECODING_ROWS = 15
_SHORT_TOKENS = 32


def run(serving: Serving, setup: Setup, *, quick: bool) -> Mapping[str, Any]:
    """Ours only: steps are counted. `setup.width` must hold all rows."""
    assert setup.width >= _DECODING_ROWS + 2, "every row needs a slot"
    warm_up(serving)
    watch = _Watch(serving)
    for number in range(_DECODING_ROWS):
        watch.submit(f"decoding-{number}", _SHORT_TOKENS, max_tokens=400)
    watch.until(lambda: watch.first_token_steps.keys() >= {f"decoding-{number}" for number in range(_DECODING_ROWS)})
    watch.step_seconds.clear()
    watch.submit("long", 1_000 if quick else 4_000, max_tokens=1)
    watch.until(lambda: "long" in watch.admission_steps)
    submitted = time.perf_counter()
    watch.submit("short", _SHORT_TOKENS, max_tokens=1)
    watch.until(lambda: "short" in watch.first_token_steps)
    waited = time.perf_counter() - submitted
    watch.until(lambda: "long" in watch.first_token_steps)
    return {
        "first_token_step": watch.first_token_steps["short"] - watch.admission_steps["short"] + 1,
        "first_token_seconds": round(waited, 3),
        "long_prompt_steps": watch.first_token_steps["long"] - watch.admission_steps["long"] + 1,
        "longest_step_seconds": round(max(watch.step_seconds), 3),
    }


class _Watch:
    """An engine whose steps are counted and timed."""

    def __init__(self, serving: Any) -> None:
        self.admission_steps: dict[str, int] = {}  # in which step a request was first worked on
        self.first_token_steps: dict[str, int] = {}
        self.step_seconds: list[float] = []
        self._engine = serving.engine
        self._steps = 0
        self._rng = random.Random(_SEED)

    def submit(self, name: str, prompt_tokens: int, *, max_tokens: int) -> None:
        from models.protocol import GenerationRequest, SamplingParams

        prompt = random_tokens(self._rng, prompt_tokens, VOCAB_TOKENS, FIRST_WORD)
        sampling = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.submit(GenerationRequest(name, prompt, sampling, stream=True))

    def until(self, reached: Callable[[], bool]) -> None:
        from models.protocol import Started

        while not reached():
            began = time.perf_counter()
            events = self._engine.step()
            self.step_seconds.append(time.perf_counter() - began)
            self._steps += 1
            for event in events:
                steps = self.admission_steps if isinstance(event, Started) else self.first_token_steps
                steps.setdefault(event.id, self._steps)
