"""What is stored of the engine's choices."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.schema import JobRequest
from models.prompt import EchoFormat
from models.protocol import Choice, Ended, TokenLogprobs
from workers.answers import choices_of, token_name

A, B, C = (TokenLogprobs(97, None), TokenLogprobs(98, -1.0, ((98, -1.0), (0xC3, -2.0))), TokenLogprobs(99, -0.5))
ENDED = Ended(
    "id",
    "succeeded",
    (Choice(0, "c", (), "stop", (C,)), Choice(1, "b", (), "length", (B,))),
    prompt_logprobs=(A, B),
)


def stored(ended: Ended = ENDED, **fields: Any) -> list[dict[str, Any]]:
    request = JobRequest.parse({"model": "echo", "prompt": "ab"} | fields)
    return [choice.stored() for choice in choices_of(request, ended, EchoFormat(100))]


def ids(logprobs: Any) -> list[int]:
    return [one["id"] for one in logprobs]


def test_an_answer_without_wishes_is_its_text() -> None:
    """Nothing is told that was not asked for."""
    assert stored() == [
        {"index": 0, "text": "c", "finish_reason": "stop"},
        {"index": 1, "text": "b", "finish_reason": "length"},
    ]


def test_tokens_are_named_by_their_text_or_their_bytes() -> None:
    """A piece of a character keeps its bytes."""
    logprobs = stored(logprobs=2)[1]["logprobs"]
    assert logprobs == ({"token": "b", "id": 98, "logprob": -1.0, "top": (("b", -1.0), ("bytes:\\xc3", -2.0))},)
    assert token_name("é ".encode()) == "é "
    assert token_name(b"\xe2\x82") == "bytes:\\xe2\\x82"


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
def test_an_echoed_prompt_goes_before_every_answer(prompt: str | list[int]) -> None:
    """Its text always, its log probabilities if the answer's were asked for; its first token has none."""
    first, second = stored(prompt=prompt, echo=True, logprobs=2)
    assert (first["text"], second["text"]) == ("abc", "abb")
    assert (ids(first["logprobs"]), ids(second["logprobs"])) == ([97, 98, 99], [97, 98, 98])
    assert "logprob" not in first["logprobs"][0]
    assert "logprobs" not in stored(prompt=prompt, echo=True)[0]


def test_the_prompts_log_probabilities_are_stored_once() -> None:
    """With the first choice: they are the same for all."""
    first, second = stored(prompt_logprobs=0)
    assert ids(first["prompt_logprobs"]) == [97, 98]
    assert "prompt_logprobs" not in second


def test_what_never_ran_has_no_answer() -> None:
    """Not even an echo."""
    assert stored(Ended("id", "expired"), echo=True) == []
