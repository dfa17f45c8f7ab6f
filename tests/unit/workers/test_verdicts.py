"""What the engine's last word means for a job: its end, or another try, and who pays."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.schema import JobRequest
from jobs.states import AttemptOutcome
from models.catalog import Catalog
from models.protocol import Choice, Ended, Failure, Structure, Timings, Usage
from workers.host import Held, Stop
from workers.tasks import retry_delay_seconds, sampling_of, settlement_of, structure_of

CHOICE = Choice(0, "partial", (1, 2), "length")
USAGE = Usage(prompt_tokens=1000, cached_tokens=400, completion_tokens=200)
TIMINGS = Timings(
    queue_seconds=1.0,
    prefill_seconds=0.5,
    decode_seconds=2.0,
    detokenize_seconds=0.1,
    time_to_first_token_seconds=1.5,
    busy_seconds=3.6,
)
PASSING = Failure("engine_error", "a step failed", retryable=True)
CROWD = Failure("engine_lost", "it died", retryable=True, in_company=True)
LASTING = Failure("invalid_request", "max_tokens: too many", retryable=False)


def ended(outcome: Any, error: Failure | None = None) -> Ended:
    """An end with text, tokens and time."""
    return Ended("id", outcome, (CHOICE,), USAGE, TIMINGS, error)


@pytest.mark.parametrize(
    ("end", "stop", "expected"),
    [
        (ended("succeeded"), None, AttemptOutcome.SUCCEEDED),
        # It was done before the stop was heard.
        (ended("succeeded"), "cancel", AttemptOutcome.SUCCEEDED),
        (ended("succeeded"), "release", AttemptOutcome.SUCCEEDED),
        (ended("cancelled"), "cancel", AttemptOutcome.CANCELLED),
        (ended("cancelled"), "release", AttemptOutcome.RELEASED),
        # The engine stopped it unasked, as when another client takes its place.
        (ended("cancelled"), None, AttemptOutcome.RELEASED),
        (ended("expired"), None, AttemptOutcome.EXPIRED),
        (ended("expired"), "cancel", AttemptOutcome.EXPIRED),
        (ended("expired"), "release", AttemptOutcome.EXPIRED),
        (ended("released"), None, AttemptOutcome.RELEASED),
        (ended("released"), "release", AttemptOutcome.RELEASED),
        # The store makes a cancelled one of it if its owner asked for that.
        (ended("released"), "cancel", AttemptOutcome.RELEASED),
        (ended("failed", PASSING), None, AttemptOutcome.RETRIED),
        (ended("failed", PASSING), "release", AttemptOutcome.RETRIED),
        (ended("failed", PASSING), "cancel", AttemptOutcome.CANCELLED),
        (ended("failed", LASTING), None, AttemptOutcome.FAILED),
        (ended("failed", LASTING), "release", AttemptOutcome.FAILED),
        (ended("failed", LASTING), "cancel", AttemptOutcome.CANCELLED),
        (ended("failed"), None, AttemptOutcome.RETRIED),
        (ended("failed", CROWD), None, AttemptOutcome.RELEASED),
        (ended("failed", CROWD), "cancel", AttemptOutcome.CANCELLED),
    ],
)
def test_each_end_in_the_engine_has_one_meaning(
    host: Any,
    held: Callable[..., Held],
    end: Ended,
    stop: Stop | None,
    expected: AttemptOutcome,
) -> None:
    """Engine outcome and reason to stop decide how the attempt ends."""
    settlement = settlement_of(host.real(), held(stop), end, 0.0)
    assert settlement.outcome is expected


def test_the_last_attempt_is_not_retried(host: Any, held: Callable[..., Held]) -> None:
    """A failure that might pass is final when no attempt is left, and keeps its reason."""
    settlement = settlement_of(host.real(), held(attempt=3, max_attempts=3), ended("failed", PASSING), 0.0)
    assert settlement.outcome is AttemptOutcome.FAILED
    assert settlement.error is not None
    assert (settlement.error.code, settlement.error.message) == ("engine_error", "a step failed")
    assert settlement.retry_after_seconds is None


def test_a_retry_waits_and_a_released_job_does_not(host: Any, held: Callable[..., Held]) -> None:
    """Only a retry has a delay and counts as an attempt."""
    retried = settlement_of(host.real(), held(), ended("failed", PASSING), 0.0)
    assert retried.retry_after_seconds is not None
    assert 0.0 <= retried.retry_after_seconds <= 1.0
    assert (retried.requeues, retried.charged) == (True, True)

    released = settlement_of(host.real(), held("release"), ended("cancelled"), 0.0)
    assert released.retry_after_seconds == 0.0
    assert (released.requeues, released.charged) == (True, False)


@pytest.mark.parametrize(
    ("end", "stop", "pays_for_tokens"),
    [
        (ended("succeeded"), None, True),
        (ended("cancelled"), "cancel", True),
        (ended("expired"), None, True),
        (ended("failed", LASTING), None, False),
        (ended("failed", PASSING), None, False),
        (ended("cancelled"), "release", False),
    ],
)
def test_tokens_are_paid_when_they_reach_the_owner_and_time_always(
    host: Any,
    held: Callable[..., Held],
    end: Ended,
    stop: Stop | None,
    *,
    pays_for_tokens: bool,
) -> None:
    """Failures and what runs again cost no tokens; every attempt's machine time is accounted for."""
    settlement = settlement_of(host.real(), held(stop), end, 0.0)
    tokens = Decimal("0.05") * 600 + Decimal("0.0125") * 400 + Decimal("0.20") * 200
    assert settlement.token_dollars == (tokens / 10**6 if pays_for_tokens else 0)
    assert settlement.machine_dollars == Decimal("0.10") * Decimal("3.6") / 3600
    assert settlement.usage.completion_tokens == 200


def test_times_are_counted_from_the_moment_the_job_could_start(host: Any, held: Callable[..., Held]) -> None:
    """Waiting for a worker, preparing and waiting in the engine add up in the queue time and the first token's."""
    settlement = settlement_of(host.real(), held(queue_seconds=10.0), ended("succeeded"), 0.25)
    timings = settlement.timings
    assert (timings.queue_seconds, timings.tokenize_seconds) == (11.0, 0.25)
    assert (timings.prefill_seconds, timings.decode_seconds, timings.detokenize_seconds) == (0.5, 2.0, 0.1)
    assert timings.time_to_first_token_seconds == 11.75
    assert timings.busy_seconds == 3.6


def test_a_job_that_never_had_a_token_has_no_time_to_it(host: Any, held: Callable[..., Held]) -> None:
    """No first token, no time to it: not zero."""
    settlement = settlement_of(host.real(), held(), Ended("id", "expired"), 0.0)
    assert settlement.timings.time_to_first_token_seconds is None
    assert settlement.choices == ()


def test_text_and_server_are_written_down(host: Any, held: Callable[..., Held]) -> None:
    """The settlement carries the choices as the owner will see them, and who made them, under the claim's token."""
    one = held()
    settlement = settlement_of(host.real(), one, ended("succeeded"), 0.0)
    assert (settlement.id, settlement.token) == (one.claim.id, one.claim.token)
    assert [choice.stored() for choice in settlement.choices] == [
        {"index": 0, "text": "partial", "finish_reason": "length"}
    ]
    assert settlement.served_by == "echo on echo, none, cpu"


@given(attempt=st.integers(1, 100), longest=st.floats(0.001, 3600))
def test_a_retry_waits_no_longer_than_it_may(attempt: int, longest: float) -> None:
    """The ceiling doubles from one second and never exceeds the longest wait."""
    delay = retry_delay_seconds(attempt, longest)
    assert 0.0 <= delay <= min(longest, 2.0 ** (attempt - 1))


def test_sampling_takes_the_requests_values_and_else_the_models() -> None:
    """What the request leaves open is the model's default; zero temperature is a value, not an absence."""
    spec = Catalog.from_mapping({"echo": {"default_max_tokens": 7, "default_temperature": 0.3}}).get("echo")
    sampling = sampling_of(JobRequest(model="echo", prompt="x"), spec)
    assert (sampling.max_tokens, sampling.temperature, sampling.n, sampling.seed) == (7, 0.3, 1, None)

    request = JobRequest.parse(
        {
            "model": "echo",
            "prompt": "x",
            "max_tokens": 3,
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 4,
            "min_p": 0.1,
            "presence_penalty": 1.5,
            "frequency_penalty": -1.5,
            "repetition_penalty": 1.1,
            "logit_bias": {"9": 2.0, "4": -1.0},
            "seed": 11,
            "stop": ["a", "b"],
            "n": 2,
            "ignore_eos": True,
        }
    )
    sampling = sampling_of(request, spec)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.0, 0.5, 4)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 1.5, -1.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.1, ((4, -1.0), (9, 2.0)))
    assert (sampling.seed, sampling.stop, sampling.n, sampling.ignore_eos) == (11, ("a", "b"), 2, True)


@pytest.mark.parametrize(
    ("fields", "prompt_logprobs"),
    [
        ({"logprobs": 2}, None),
        ({"logprobs": 2, "echo": True}, 2),
        ({"echo": True}, None),
        ({"echo": True, "max_tokens": 0}, 0),
        ({"logprobs": 2, "prompt_logprobs": 1, "echo": True}, 1),
        ({"prompt_logprobs": 3, "max_tokens": 0}, 3),
    ],
)
def test_an_echoed_prompt_is_told_like_its_answer(fields: dict[str, Any], prompt_logprobs: int | None) -> None:
    """Whoever has the prompt echoed with log probabilities gets the prompt's too."""
    spec = Catalog.from_mapping({"echo": {}}).get("echo")
    request = JobRequest.parse({"model": "echo", "prompt": "x", "stop_token_ids": [4], "min_tokens": 0} | fields)
    sampling = sampling_of(request, spec)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (request.logprobs, prompt_logprobs)
    assert sampling.stop_token_ids == (4,)
    assert sampling.max_tokens == fields.get("max_tokens", spec.default_max_tokens)


@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Structure(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"b": 1, "a": 2}}}},
            Structure(json_schema='{"b":1,"a":2}'),
        ),
        ({"regex": "a+"}, Structure(regex="a+")),
        ({"choice": ["a", "b"]}, Structure(choice=("a", "b"))),
    ],
)
def test_structures_reach_the_engine(fields: dict[str, Any], structure: Structure | None) -> None:
    """Each kind in the engine's own words, a schema with its order kept."""
    assert structure_of(JobRequest.parse({"model": "echo", "prompt": "x"} | fields)) == structure
