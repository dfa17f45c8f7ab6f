"""What lm-eval does, `local-completions` on tasks made here: lm_eval_client.py BASE_URL KEY MODEL_FOLDER.

It runs in an environment of its own (`make test-clients`), and exits with 0 if it measures what is so.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

base_url, key, folder = sys.argv[1:]
os.environ["OPENAI_API_KEY"] = key

from lm_eval import simple_evaluate  # noqa: E402 - it reads the environment

SUMS = [(12, 30), (7, 8), (40, 2), (25, 25), (3, 90)]
LINES = [{"question": f"What is {a} + {b}?", "right": str(a + b), "wrong": str(a + b + 10)} for a, b in SUMS]
FILE = Path("sums.jsonl")
FILE.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")

COMMON: dict[str, Any] = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(FILE.absolute())}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "target_delimiter": "",
}
# Log probabilities of prompts that are given as token ids.
CHOOSE = COMMON | {
    "task": "choose",
    "output_type": "multiple_choice",
    "doc_to_choice": ["{{wrong}}", "{{right}}"],
    "doc_to_target": 1,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITE = COMMON | {
    "task": "write",
    "output_type": "generate_until",
    "doc_to_target": "{{right}}",
    "generation_kwargs": {"until": ["<|end|>"], "max_gen_toks": 32, "temperature": 0},
    # The answer is a sentence; its last number is the sum.
    "filter_list": [
        {
            "name": "last",
            "filter": [
                {"function": "regex", "regex_pattern": r"(\d+)", "group_select": -1},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}

ARGUMENTS = {"model": "tiny-chat", "base_url": f"{base_url}/completions", "tokenizer": folder, "max_length": 1024}
found = simple_evaluate(
    model="local-completions",
    model_args=ARGUMENTS,
    tasks=[CHOOSE, WRITE],
    batch_size=2,
    apply_chat_template=True,
    log_samples=False,
)
assert found is not None
results = found["results"]
assert results["choose"]["acc,none"] == 1.0, results
assert results["write"]["exact_match,last"] == 1.0, results
