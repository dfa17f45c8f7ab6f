"""Examine tiny-chat on held-out problems: `python -m examples.tiny_chat_training.evaluate examples/tiny-chat`.

An answer counts only if every character of it is right and it ends by itself. Decoding is greedy.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_chat_training import generate
from examples.tiny_chat_training.generate import Message, Split, Turn

LONGEST_ANSWER_TOKENS = 80
PROMPTS_AT_ONCE = 50


@dataclass(frozen=True)
class Score:
    """How many examples of a skill were answered right."""

    skill: str
    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """The share answered right."""
        return self.right / self.total

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the accuracy (Wilson's score interval)."""
        z = 1.96
        scale = 1 + z * z / self.total
        middle = (self.accuracy + z * z / (2 * self.total)) / scale
        half = z * sqrt(self.accuracy * (1 - self.accuracy) / self.total + (z / self.total / 2) ** 2) / scale
        return max(0.0, middle - half), min(1.0, middle + half)

    def row(self) -> str:
        """Return the score as a line of a Markdown table."""
        low, high = self.interval()
        return f"| {self.skill} | {self.right} of {self.total} | {self.accuracy:.1%} | {low:.1%} to {high:.1%} |"

    def record(self) -> dict[str, Any]:
        """Return the score as JSON values."""
        return {"skill": self.skill, "right": self.right, "total": self.total, "interval_95": self.interval()}


Exam = Callable[[Random], list[Message]]
"""Makes one held-out conversation; its last message is the right answer."""


def alone(turn: Callable[[Random], Turn]) -> Exam:
    """Return an exam whose conversations are one turn."""
    return lambda rng: turn(rng).messages()


def up_to_two_digits(rng: Random) -> int:
    """Return two, in one of ten cases one."""
    return 2 if rng.random() < 0.9 else 1


def any_digits(rng: Random) -> int:
    """Return one, two or three."""
    return rng.randint(1, 3)


def remembering(rng: Random, lessons: int) -> list[Message]:
    """Return a fact told in the first turn and asked for after `lessons` turns about other things."""
    told = generate.fact(rng, Split.HELD_OUT)
    between = [generate.lesson(rng, Split.HELD_OUT) for _ in range(lessons)]
    turns = [generate.tell(rng, told), *between, generate.ask(rng, told.noun, told.value)]
    return [message for turn in turns for message in turn.messages()]


def never_told(rng: Random) -> list[Message]:
    """Return a fact asked for that was not told; another one was."""
    told, other = generate.fact(rng, Split.HELD_OUT), generate.fact(rng, Split.HELD_OUT)
    if told.noun == other.noun:
        return never_told(rng)
    return [*generate.tell(rng, told).messages(), *generate.ask(rng, other.noun, None).messages()]


HELD_OUT = Split.HELD_OUT
EXAMS: dict[str, Exam] = {
    "add, up to two digits": alone(lambda rng: generate.add(rng, HELD_OUT, up_to_two_digits(rng))),
    "add, three digits": alone(lambda rng: generate.add(rng, HELD_OUT, 3)),
    "subtract, up to two digits": alone(lambda rng: generate.subtract(rng, HELD_OUT, up_to_two_digits(rng))),
    "subtract, three digits": alone(lambda rng: generate.subtract(rng, HELD_OUT, 3)),
    "compare, up to three digits": alone(lambda rng: generate.compare(rng, HELD_OUT, any_digits(rng))),
    "reverse a word": alone(lambda rng: generate.reverse(rng, HELD_OUT)),
    "spell a word": alone(lambda rng: generate.spell(rng, HELD_OUT)),
    "count letters": alone(lambda rng: generate.count(rng, HELD_OUT)),
    "answer in JSON, any skill": alone(lambda rng: generate.json_lesson(rng, HELD_OUT)),
    "remember across 1 to 3 other turns": lambda rng: remembering(rng, rng.randint(1, 3)),
    "remember across 25 other turns": lambda rng: remembering(rng, 25),
    "say that it was not told": never_told,
}


def answers(model: Any, tokenizer: Any, prompts: Sequence[list[Message]]) -> list[str]:
    """Return the greedy answer to each conversation, its end token included if it came."""
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        outputs = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER_TOKENS, do_sample=False)
    replies: list[str] = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
    return [reply.replace(tokenizer.pad_token, "") for reply in replies]


def score(model: Any, tokenizer: Any, skill: str, total: int) -> Score:
    """Examine one skill on `total` conversations, the same ones at every call."""
    rng = Random(f"exam {skill}")
    right = 0
    for first in range(0, total, PROMPTS_AT_ONCE):
        exams = [EXAMS[skill](rng) for _ in range(min(PROMPTS_AT_ONCE, total - first))]
        expected = [exam[-1]["content"] + tokenizer.eos_token for exam in exams]
        given = answers(model, tokenizer, [exam[:-1] for exam in exams])
        right += sum(map(str.__eq__, given, expected))
    return Score(skill, right, total)


def main() -> None:
    """Print the table of all skills and, if asked, write it."""
    parser = argparse.ArgumentParser(description="Examine tiny-chat on held-out problems.")
    parser.add_argument("model", type=Path, help="the model's folder")
    parser.add_argument("--examples", type=int, default=500, help="conversations per skill")
    parser.add_argument("--dtype", default="auto", help="auto: as stored; or float32")
    parser.add_argument("--output", type=Path, help="write the scores to this JSON file")
    chosen = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=chosen.dtype)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    print("| skill | right | accuracy | 95 % interval |\n|---|---|---|---|")
    scores = []
    for skill in EXAMS:
        scores.append(score(model, tokenizer, skill, chosen.examples))
        print(scores[-1].row(), flush=True)
    if chosen.output:
        chosen.output.write_text(json.dumps([each.record() for each in scores], indent=1) + "\n")


if __name__ == "__main__":
    main()
