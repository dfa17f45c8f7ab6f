"""What an engine refuses at intake."""

import math
from dataclasses import replace

import pytest

from models.protocol import GenerationRequest, InvalidRequest, SamplingParams, check_request

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
        ("n", 0),
        ("n", 129),
    ],
)
def test_bad_sampling_is_refused_by_field(field: str, value: object) -> None:
    """Sampling settings out of range are refused, and the error names the field."""
    with pytest.raises(InvalidRequest) as refused:
        check(replace(GOOD, sampling=replace(GOOD.sampling, **{field: value})))
    assert refused.value.field == field


def test_the_largest_request_that_fits_is_taken() -> None:
    """Prompt and completion may fill the context to the last token, and ranges include their ends."""
    check(
        replace(GOOD, sampling=replace(GOOD.sampling, max_tokens=17, temperature=2.0, top_p=1.0, n=128, seed=-(2**63)))
    )
