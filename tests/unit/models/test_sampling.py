"""The choice of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.protocol import SamplingParams
from models.sampling import Sampler, _keep_top, sample

VOCAB = 50


def sampler(choice: int = 0, prompt: tuple[int, ...] = (1, 2), **settings: Any) -> Sampler:
    return Sampler(SamplingParams(max_tokens=10, **settings), choice, prompt, VOCAB, "cpu")


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def draws(count: int, row_logits: torch.Tensor, **settings: Any) -> list[int]:
    return sample(row_logits.expand(count, -1).clone(), [sampler(seed=seed, **settings) for seed in range(count)])


def test_greedy_takes_the_likeliest_token_and_no_random_numbers() -> None:
    """Temperature 0 is argmax, and a greedy row has no generator."""
    rows = logits(8)
    samplers = [sampler(temperature=0.0) for _ in range(8)]
    assert sample(rows.clone(), samplers) == rows.argmax(dim=-1).tolist()
    assert all(each._generator is None for each in samplers)


def test_draws_follow_the_distribution() -> None:
    """Over many rows, each token comes as often as its probability says."""
    row = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05] + [0.0] * (VOCAB - 4)))
    drawn = torch.bincount(torch.tensor(draws(4_000, row)), minlength=VOCAB) / 4_000
    assert drawn[:4].tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert drawn[4:].sum() == 0


@pytest.mark.parametrize(
    ("settings", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
        ({"temperature": 0.5, "top_p": 0.9}, lambda ids, rows: TopPLogitsWarper(0.9)(ids, rows / 0.5)),
    ],
)
def test_truncation_leaves_the_same_tokens_as_transformers(settings: dict, warper: Any) -> None:
    """Only tokens that transformers' own filter keeps are drawn, and every likely one of them is."""
    row = logits(seed=3)
    kept = warper(None, row.clone()).softmax(dim=-1)[0]
    drawn = set(draws(2_000, row, **settings))
    assert drawn <= set(kept.nonzero().flatten().tolist())
    assert drawn >= set((kept > 0.01).nonzero().flatten().tolist())


def test_top_k_and_top_p_together_equal_transformers() -> None:
    """Temperature, then top-k, then top-p, in rows with rules of their own, give transformers' logits exactly."""
    rows = logits(4)
    rules = [SamplingParams(1, top_k=k, top_p=p) for k, p in ((0, 1.0), (5, 1.0), (0, 0.6), (7, 0.8))]
    expected = rows.clone()
    for at, rule in enumerate(rules):
        one = TemperatureLogitsWarper(1.0)(None, expected[at : at + 1])
        one = TopKLogitsWarper(rule.top_k)(None, one) if rule.top_k else one
        expected[at] = (TopPLogitsWarper(rule.top_p)(None, one) if rule.top_p < 1 else one)[0]
    assert torch.equal(_keep_top(rows, rules), expected)


def test_repetition_penalty_equals_transformers() -> None:
    """Tokens of the prompt and of the answer count as seen."""
    one = sampler(prompt=(1, 2, 30), repetition_penalty=1.7, temperature=0.0)
    one.note(40)
    row = logits(seed=5)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 30, 40]]), row.clone())[0]
    one.adjust(row[0])
    assert torch.equal(row[0], expected)


def test_presence_frequency_and_bias_add_up() -> None:
    """Presence counts once, frequency each time, both only for generated tokens; biases are added."""
    one = sampler(prompt=(7,), presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((9, 3.0), (4, -1.0)))
    for token in (3, 3, 4):
        one.note(token)
    row = torch.zeros(VOCAB)
    one.adjust(row)
    assert {at: row[at].item() for at in (3, 4, 7, 9)} == {3: -1.0, 4: -1.75, 7: 0.0, 9: 3.0}


def test_a_seeded_row_does_not_depend_on_its_neighbours() -> None:
    """The same seed gives the same tokens alone and in a mixed batch, step after step."""
    steps = [logits(3, seed) for seed in range(20)]
    alone, mixed = sampler(seed=11), [sampler(temperature=0.0), sampler(seed=11), sampler(top_k=3)]
    by_itself = [sample(step[1:2].clone(), [alone])[0] for step in steps]
    in_company = [sample(step.clone(), mixed)[1] for step in steps]
    assert by_itself == in_company
    assert len(set(by_itself)) > 1


def test_choices_and_unseeded_rows_have_random_numbers_of_their_own() -> None:
    """Two choices of one seed differ, two seeds differ, and without a seed nothing repeats."""
    streams = [sampler(seed=7), sampler(1, seed=7), sampler(seed=8), sampler(), sampler()]
    assert len({tuple(stream.uniform() for _ in range(4)) for stream in streams}) == 5


def test_a_tiny_temperature_is_greedy() -> None:
    """A temperature that would overflow the logits is taken as 0."""
    rows = logits(2)
    assert sample(rows.clone(), [sampler(temperature=1e-30), sampler(temperature=1e-6)]) == rows.argmax(-1).tolist()
