"""What inspect-ai does with a gateway, in the background and in batches: inspect_client.py BASE_URL KEY.

It runs in an environment of its own (`make test-clients`), and exits with 0 if every answer came and is right.
"""

import sys
from typing import Any

from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import BatchConfig, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

base_url, key = sys.argv[1:]
SUMS = [(12, 30), (7, 8), (40, 2), (25, 25), (3, 90)]
SAMPLES = [Sample(input=f"What is {a} + {b}?", target=str(a + b)) for a, b in SUMS]


def check(mode: str, config: GenerateConfig, **arguments: Any) -> None:
    """One evaluation, every sample of which must be answered right."""
    model = get_model("openai/tiny-chat", base_url=base_url, api_key=key, config=config, memoize=False, **arguments)
    [log] = evaluate(Task(SAMPLES, solver=generate(), scorer=includes()), model=model, display="none", log_dir=mode)
    assert log.status == "success", log.error
    assert log.results is not None
    [score] = log.results.scores
    assert score.metrics["accuracy"].value == 1.0, score.metrics
    assert sum(usage.output_tokens for usage in log.stats.model_usage.values()) > 0


check("background", GenerateConfig(temperature=0, max_tokens=32), responses_api=True, background=True)
batches = BatchConfig(size=len(SAMPLES), send_delay=0.5, tick=0.5)
check("batch", GenerateConfig(temperature=0, max_tokens=32, batch=batches))
