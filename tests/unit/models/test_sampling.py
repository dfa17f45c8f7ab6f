"""The choice of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.protocol import SamplingParams, Structure
from models.sampling import Sampler, _adjust, _keep_top, logprobs, sample

VOCAB = 50
EOS = 49


def sampler(choice: int = 0, prompt: tuple[int, ...] = (1, 2), matcher: Any = None, **settings: Any) -> Sampler:
    sampling = SamplingParams(max_tokens=10, **settings)
    return Sampler(sampling, choice, prompt, VOCAB, "cpu", eos_token_ids=(EOS,), matcher=matcher)


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
    _adjust(row, [one])
    assert torch.equal(row[0], expected)


def test_presence_frequency_and_bias_add_up() -> None:
    """Presence counts once, frequency each time, both only for generated tokens; biases are added."""
    one = sampler(prompt=(7,), presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((9, 3.0), (4, -1.0)))
    for token in (3, 3, 4):
        one.note(token)
    row = torch.zeros(1, VOCAB)
    _adjust(row, [one])
    assert {at: row[0, at].item() for at in (3, 4, 7, 9)} == {3: -1.0, 4: -1.75, 7: 0.0, 9: 3.0}


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


# -- against a plain reference ----------------------------------------------------------------------------------

Rules = dict[str, Any]
TOKENS = st.integers(0, VOCAB - 1)
RULES = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**63 - 1)},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 3, 20, 1_000]),
        "top_p": st.sampled_from([0.05, 0.5, 0.93, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        "presence_penalty": st.sampled_from([-1.5, 0.7]),
        "frequency_penalty": st.sampled_from([-0.4, 1.3]),
        "repetition_penalty": st.sampled_from([0.8, 1.6]),
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 2.5]), max_size=4).map(
            lambda biases: tuple(biases.items())
        ),
        "min_tokens": st.integers(0, 5),
        "stop_token_ids": st.lists(TOKENS, max_size=3).map(tuple),
    },
)


def plainly(row: torch.Tensor, rules: SamplingParams, prompt: Sequence[int], generated: list[int], at: float) -> int:
    """One row's next token, one rule after the other, as the books have it; `at` is its random number."""
    row = row.clone()
    if rules.repetition_penalty != 1.0:
        for token in {*prompt, *generated}:
            row[token] = (
                row[token] / rules.repetition_penalty if row[token] > 0 else row[token] * rules.repetition_penalty
            )
    for token in set(generated):
        row[token] -= rules.presence_penalty + rules.frequency_penalty * generated.count(token)
    for token, bias in rules.logit_bias:
        row[token] += bias
    if len(generated) < rules.min_tokens:
        row[[EOS, *rules.stop_token_ids]] = -torch.inf
    if rules.temperature == 0.0:
        return int(row.argmax())
    row /= rules.temperature
    if rules.top_k:
        row[row < row.sort(descending=True).values[: rules.top_k][-1]] = -torch.inf
    likely = row.softmax(-1).sort(descending=True).values
    if rules.top_p < 1:
        needed = next((n for n in range(1, VOCAB + 1) if likely[:n].sum() >= rules.top_p), VOCAB)
        row[row.softmax(-1) < likely[needed - 1]] = -torch.inf
    weights = row.softmax(-1)
    weights[weights < rules.min_p * weights.max() * (1 - 1e-6)] = 0.0
    sums = weights.double().cumsum(-1)
    return next(token for token in range(VOCAB) if sums[token] > at * sums[-1])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(RULES, st.lists(TOKENS, min_size=1, max_size=5)), min_size=1, max_size=5), st.integers(0, 999)
)
def test_a_mixed_batch_chooses_as_a_plain_reference(rows: list[tuple[Rules, list[int]]], seed: int) -> None:
    """Whatever the rules of a row and of its neighbours, each step's token is the one that the rules say."""
    params = [SamplingParams(10, **rules) for rules, _ in rows]
    samplers = [sampler(prompt=tuple(prompt), **rules) for rules, prompt in rows]
    twins = [sampler(**rules) for rules, _ in rows]
    generated: list[list[int]] = [[] for _ in rows]
    for step in range(6):
        block = logits(len(rows), 1_000 * seed + step)
        numbers = [0.0 if twin.is_greedy else twin.uniform() for twin in twins]
        expected = [
            plainly(row, rules, prompt, before, number)
            for row, rules, (_, prompt), before, number in zip(block, params, rows, generated, numbers, strict=True)
        ]
        assert sample(block, samplers) == expected
        for before, token in zip(generated, expected, strict=True):
            before.append(token)


@settings(deadline=None, max_examples=40)
@given(RULES, st.lists(RULES, max_size=4), st.integers(0, 999), st.data())
def test_a_seed_is_independent_of_neighbours(mine: Rules, others: list[Rules], seed: int, data: st.DataObject) -> None:
    """A row's tokens are the same alone, and at any place among any neighbours that come and go."""
    blocks = [logits(5, 1_000 * seed + step) for step in range(6)]
    alone = sampler(**mine)
    by_itself = [sample(block[:1], [alone])[0] for block in blocks]
    again, company, in_company = sampler(**mine), [sampler(**rules) for rules in others], []
    for block in blocks:
        beside = company[: data.draw(st.integers(0, len(company)))]
        place = data.draw(st.integers(0, len(beside)))
        mixed = torch.cat([block[1 : 1 + place], block[:1], block[1 + place : 1 + len(beside)]])
        in_company.append(sample(mixed, [*beside[:place], again, *beside[place:]])[place])
    assert in_company == by_itself


def test_top_p_looks_behind_the_first_thousand_tokens() -> None:
    """A flat distribution has a nucleus of nearly all tokens, in a vocabulary larger than what is looked at first."""
    row = torch.linspace(0.0, 0.1, 3_000).unsqueeze(0)
    kept = _keep_top(row, [SamplingParams(1, top_p=0.9)]).isfinite()
    assert torch.equal(kept, TopPLogitsWarper(0.9)(None, row).isfinite())
    assert kept.sum() > 2_000


def test_logits_stay_as_they_are_and_likeliest_tokens_need_no_conversion() -> None:
    """Sampling leaves the block alone, and plain greedy rows are decided in the model's own type."""
    block = logits(3).bfloat16()
    before = block.clone()
    chosen = sample(block, [sampler(temperature=0.0), sampler(seed=1), sampler(temperature=0.0, presence_penalty=1.0)])
    assert torch.equal(block, before)
    assert chosen[0] == int(before[0].argmax())
    assert sampler(temperature=0.0).takes_likeliest
    assert not sampler(temperature=0.0, logit_bias=((1, 1.0),)).takes_likeliest


# -- ends -------------------------------------------------------------------------------------------------------


def test_no_end_comes_before_min_tokens() -> None:
    """EOS and stop tokens are not chosen for the first so many tokens, whatever speaks for them."""
    one = sampler(temperature=0.0, min_tokens=3, stop_token_ids=(7,), logit_bias=((EOS, 100.0), (7, 90.0)))
    chosen = [sample(logits(seed=step), [one])[0] for step in range(4)]
    assert not {7, EOS} & set(chosen[:3])
    assert (chosen[3], one.ended, one.silent) == (EOS, True, True)


def test_eos_is_silent_unless_it_is_to_be_ignored() -> None:
    """EOS ends a row and is no text; ignored, it is a token like any other."""
    for ignore, ended in ((False, True), (True, False)):
        one = sampler(temperature=0.0, ignore_eos=ignore)
        one.note(EOS)
        assert (one.ended, one.silent) == (ended, ended)


# -- log probabilities ------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model() -> None:
    """They are the log softmax of the raw logits, whatever was chosen, with as many alternatives as each row wants."""
    block = logits(4)
    expected = block.log_softmax(-1)
    told = logprobs(block, [5, 6, 7, 8], [0, None, 3, 1])
    assert told[1] is None
    for row, token, count in ((0, 5, 0), (2, 7, 3), (3, 8, 1)):
        assert told[row].token_id == token
        assert told[row].logprob == pytest.approx(expected[row, token].item(), abs=1e-6)
        values, ids = expected[row].topk(count)
        assert [token_id for token_id, _ in told[row].top] == ids.tolist()
        assert [value for _, value in told[row].top] == pytest.approx(values.tolist(), abs=1e-6)


def test_logprobs_that_nobody_wants_cost_nothing() -> None:
    """Without a row that asks, the logits are not looked at."""
    assert logprobs(None, [1, 2], [None, None]) == [None, None]


def test_logprobs_are_short_numbers_that_json_can_carry() -> None:
    """Six decimals, and a token that the model excludes is very unlikely instead of infinitely so."""
    block = torch.tensor([[0.1, 0.2, -torch.inf]])
    told = logprobs(block, [2], [20])[0]
    assert told.logprob == -9_999.0
    assert all(len(str(value)) <= 9 for _, value in told.top)
    assert len(told.top) == 3


# -- structure --------------------------------------------------------------------------------------------------


class Only:
    """A matcher that allows one text, token by token, and then EOS; or breaks at a place."""

    def __init__(self, *token_ids: int, breaks_at: int | None = None) -> None:
        self.rest = list(token_ids)
        self.error: str | None = None
        self._breaks_at = breaks_at

    @property
    def is_complete(self) -> bool:
        return not self.rest

    def allowed(self) -> bytes:
        mask = bytearray(8)
        mask[self.rest[0] // 8] |= 1 << self.rest[0] % 8
        return bytes(mask)

    def advance(self, token_id: int) -> None:
        assert token_id == self.rest.pop(0)
        if len(self.rest) == self._breaks_at:
            self.error = "too much"


def test_a_structure_decides_and_ends_its_row() -> None:
    """Only allowed tokens come, greedy or drawn, and the row ends with its structure; a neighbour is left alone."""
    for temperature in (0.0, 1.0):
        guided = sampler(temperature=temperature, matcher=Only(3, 48, 20), logit_bias=((4, 100.0),))
        plain = sampler(temperature=0.0)
        blocks = [logits(2, seed) for seed in range(3)]
        chosen = [sample(block, [guided, plain]) for block in blocks]
        assert [pair[0] for pair in chosen] == [3, 48, 20]
        assert [pair[1] for pair in chosen] == [int(block[1].argmax()) for block in blocks]
        assert (guided.ended, guided.silent, guided.failure) == (True, False, None)
        assert sample(logits(1), [guided])  # one more, as the row may still be in the batch


def test_a_structure_that_cannot_go_on_fails_its_row() -> None:
    """The failure names the field, and is not tried again."""
    guided = sampler(matcher=Only(3, 4, 5, breaks_at=1), structure=Structure(regex="x"))
    for _ in range(2):
        sample(logits(), [guided])
    assert guided.failure is not None
    assert (guided.failure.code, guided.failure.retryable) == ("structure_failed", False)
    assert guided.failure.message == "regex: too much"


def test_a_vocabulary_larger_than_the_tokenizers_is_masked_to_its_end() -> None:
    """Logits without a token behind them are never chosen while a structure guides; nor is a mask too long an error."""
    for width in (70, 20):
        block = torch.zeros(1, width)
        block[0, -1] = 50.0
        assert sample(block, [sampler(temperature=0.0, matcher=Only(3, 4))]) == [3]
