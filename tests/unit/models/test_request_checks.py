"""What an engine refuses at intake."""

import json
import math
from dataclasses import replace

import pytest

from models.protocol import GenerationRequest, InvalidRequest, SamplingParams, Structure, check_request

GOOD = GenerationRequest("job", (1, 2, 3), SamplingParams(max_tokens=5))


def check(request: GenerationRequest) -> None:
    check_request(request, vocab_tokens=10, context_tokens=20)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("id", {"id": ""}),
        ("id", {"id": 7}),
        ("prompt", {"prompt_token_ids": ()}),
        ("prompt", {"prompt_token_ids": (1, 10)}),
        ("prompt", {"prompt_token_ids": (1, -1)}),
        ("prompt", {"prompt_token_ids": (1, True)}),
        ("prompt", {"prompt_token_ids": (1, 2.0)}),
        ("prompt", {"prompt_token_ids": (1,) * 20}),
        ("deadline_seconds", {"deadline_seconds": 0}),
        ("deadline_seconds", {"deadline_seconds": math.nan}),
        ("priority", {"priority": 10}),
        ("cache_salt", {"cache_salt": None}),
    ],
)
def test_bad_request_is_refused_by_field(field: str, changes: dict) -> None:
    """A request that breaks the contract is refused, and the error names the field."""
    with pytest.raises(InvalidRequest) as refused:
        check(replace(GOOD, **changes))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 18),
        ("max_tokens", "5"),
        ("temperature", 3.0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("logit_bias", ((10, 1.0),)),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", tuple((1, 0.0) for _ in range(1_025))),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (10,)),
        ("stop_token_ids", (True,)),
        ("stop_token_ids", (1,) * 1_025),
        ("min_tokens", -1),
        ("min_tokens", 6),
        ("min_tokens", "1"),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("n", 0),
        ("n", 129),
    ],
)
def test_bad_sampling_is_refused_by_field(field: str, value: object) -> None:
    """Sampling settings out of range are refused, and the error names the field."""
    with pytest.raises(InvalidRequest) as refused:
        check(replace(GOOD, sampling=replace(GOOD.sampling, **{field: value})))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "structure"),
    [
        ("response_format", Structure()),
        ("response_format", Structure(json_schema="")),
        ("response_format", Structure(json_schema="[]")),
        ("response_format", Structure(json_schema="{")),
        ("response_format", Structure(json_schema='{"a":' * 100_000)),
        ("response_format", Structure(json_schema='{"a":' * 5_000 + "1" + "}" * 5_000)),
        (
            "response_format",
            Structure(json_schema=json.dumps({"title": "é" * 30_000}, ensure_ascii=False) + " " * 9_999),
        ),
        ("regex", Structure(regex="")),
        ("regex", Structure(regex="é" * 2_049)),
        ("regex", Structure(regex=5)),
        ("choice", Structure(choice=())),
        ("choice", Structure(choice=("a", ""))),
        ("choice", Structure(choice=("a",) * 1_025)),
        ("choice", Structure(choice=("a" * 40_000, "b" * 40_000))),
        ("choice", Structure(choice=("a",), json_object=True)),
    ],
)
def test_bad_structures_are_refused_by_field(field: str, structure: Structure) -> None:
    """A structure of the wrong form or size is refused before anything compiles it, under its caller's name for it."""
    with pytest.raises(InvalidRequest) as refused:
        check(replace(GOOD, sampling=replace(GOOD.sampling, structure=structure)))
    assert refused.value.field == field


@pytest.mark.parametrize(("field", "value"), [("min_tokens", 1), ("ignore_eos", True)])
def test_a_structure_ends_by_itself(field: str, value: object) -> None:
    """What would keep a row from ending cannot be asked together with a structure."""
    with pytest.raises(InvalidRequest) as refused:
        check(replace(GOOD, sampling=replace(GOOD.sampling, structure=Structure(json_object=True), **{field: value})))
    assert refused.value.field == field


def test_an_answer_without_a_token_is_only_for_prompt_logprobs() -> None:
    """max_tokens may be 0 if there is something else to tell."""
    check(replace(GOOD, sampling=SamplingParams(0, prompt_logprobs=0)))
    with pytest.raises(InvalidRequest, match="max_tokens"):
        check(replace(GOOD, sampling=SamplingParams(0)))


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("logprobs", {"max_tokens": 1_000, "n": 128, "logprobs": 2}),
        ("prompt_logprobs", {"max_tokens": 10, "prompt_logprobs": 20}),
    ],
)
def test_more_log_probabilities_than_a_result_should_hold_are_refused(field: str, settings: dict) -> None:
    """Their number is bounded, for a result is one value in the database."""
    request = replace(GOOD, prompt_token_ids=(1,) * 13_000, sampling=SamplingParams(**settings))
    with pytest.raises(InvalidRequest, match="at most 262,144") as refused:
        check_request(request, vocab_tokens=10, context_tokens=20_000)
    assert refused.value.field == field


def test_the_largest_request_that_fits_is_taken() -> None:
    """Prompt and completion may fill the context to the last token, and ranges include their ends."""
    check(
        replace(GOOD, sampling=replace(GOOD.sampling, max_tokens=17, temperature=2.0, top_p=1.0, n=128, seed=-(2**63)))
    )
