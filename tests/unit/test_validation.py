"""What a model refuses of a request that is well formed."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import RequestInvalid
from jobs.schema import JobRequest
from jobs.settings import Settings
from producer.validation import Validator


@pytest.fixture
def validator() -> Validator:
    return Validator(Settings())


def refused(validator: Validator, model: str, **fields: Any) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as refusal:
        validator.check(JobRequest.parse({"model": model, "prompt": "hello"} | fields))
    return refusal.value


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("logprobs", {"logprobs": 0}),
        ("prompt_logprobs", {"prompt_logprobs": 0}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("regex", {"regex": "a"}),
        ("choice", {"choice": ["a"]}),
    ],
)
def test_echo_refuses_what_takes_a_model(validator: Validator, field: str, fields: dict[str, Any]) -> None:
    """It only repeats, and says so by the field's name, before a row exists."""
    error = refused(validator, "echo", **fields)
    assert (error.field, error.code) == (field, "unsupported_value")
    assert "repeats" in error.message


def test_min_tokens_must_fit_the_models_own_limit(validator: Validator) -> None:
    """Where the request leaves max_tokens open, the model's default counts."""
    assert refused(validator, "echo", min_tokens=2**20).field == "min_tokens"


def test_echo_still_echoes(validator: Validator) -> None:
    """Putting the prompt before the answer takes no model."""
    assert validator.check(JobRequest.parse({"model": "echo", "prompt": "hello", "echo": True})).echo


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("logprobs", {"logprobs": 20, "n": 128, "max_tokens": 100}),
        ("logprobs", {"logprobs": 20, "n": 128, "max_tokens": 1, "prompt": "a b " * 100, "echo": True}),
    ],
)
def test_a_result_is_kept_small(validator: Validator, field: str, fields: dict[str, Any]) -> None:
    """The number of log probabilities is bounded, an echoed prompt's counted for every choice."""
    error = refused(validator, "tiny-chat", **fields)
    assert error.field == field
    assert "262,144" in error.message
