"""What a request may say, what is said about one that may not, and what is kept of it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.errors import RequestInvalid
from jobs.schema import Choice, JobError, JobRequest, TokenLogprob

HELLO = [{"role": "user", "content": "hello"}]
NAN, INF = math.nan, math.inf
LONE = "half a pair: \ud83d"
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)

REFUSED_VALUES = [
    ("model", 3, "model"),
    ("model", "", "model"),
    ("model", "m" * 256, "model"),
    ("model", LONE, "model"),
    ("prompt", "", "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", {}, "prompt"),
    ("prompt", LONE, "prompt"),
    ("prompt", b"\xff\xfe", "prompt"),
    ("prompt", [1, -1], "prompt[1]"),
    ("prompt", ["a"], "prompt[0]"),
    ("prompt", [1, 2, 2**31], "prompt[2]"),
    ("max_tokens", -1, "max_tokens"),
    ("min_tokens", -1, "min_tokens"),
    ("stop_token_ids", [-1], "stop_token_ids[0]"),
    ("stop_token_ids", [1] * 1_025, "stop_token_ids"),
    ("logprobs", 21, "logprobs"),
    ("prompt_logprobs", -1, "prompt_logprobs"),
    ("regex", "", "regex"),
    ("regex", "é" * 2_049, "regex"),
    ("choice", [], "choice"),
    ("choice", ["a", ""], "choice[1]"),
    ("choice", ["a"] * 1_025, "choice"),
    ("choice", ["a" * 40_000, "b" * 40_000], "choice"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": []}}, "response_format.json_schema.schema"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"schema": {"a": "b" * 65_536}}},
        "response_format.json_schema.schema",
    ),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"schema": {"enum": [2**70]}}},
        "response_format.json_schema.schema",
    ),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"schema": {"enum": [LONE]}}},
        "response_format.json_schema.schema",
    ),
    ("response_format", {}, "response_format"),
    ("max_tokens", 1.5, "max_tokens"),
    ("max_tokens", 2**31, "max_tokens"),
    ("n", 0, "n"),
    ("n", 129, "n"),
    ("temperature", 3, "temperature"),
    ("temperature", -0.1, "temperature"),
    ("temperature", NAN, "temperature"),
    ("temperature", "warm", "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.1, "top_p"),
    ("top_p", NAN, "top_p"),
    ("top_k", -1, "top_k"),
    ("min_p", -0.1, "min_p"),
    ("min_p", NAN, "min_p"),
    ("presence_penalty", 2.1, "presence_penalty"),
    ("presence_penalty", NAN, "presence_penalty"),
    ("frequency_penalty", -2.1, "frequency_penalty"),
    ("frequency_penalty", NAN, "frequency_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("repetition_penalty", INF, "repetition_penalty"),
    ("repetition_penalty", NAN, "repetition_penalty"),
    ("logit_bias", {7: 101}, "logit_bias[7]"),
    ("logit_bias", {7: NAN}, "logit_bias[7]"),
    ("logit_bias", {-1: 1}, "logit_bias[-1]"),
    ("logit_bias", {"seven": 1}, "logit_bias.seven"),
    ("logit_bias", dict.fromkeys(range(1025), 0), "logit_bias"),
    ("seed", -1, "seed"),
    ("seed", 2**63, "seed"),
    ("stop", "END", "stop"),
    ("stop", [""], "stop[0]"),
    ("stop", ["a", LONE], "stop[1]"),
    ("stop", ["a", "b" * 1001], "stop[1]"),
    ("stop", ["a"] * 17, "stop"),
    ("ignore_eos", "perhaps", "ignore_eos"),
    ("idempotency_key", "", "idempotency_key"),
    ("idempotency_key", "two\nlines", "idempotency_key"),
    ("idempotency_key", "nul\x00", "idempotency_key"),
    ("idempotency_key", "k" * 256, "idempotency_key"),
    ("idempotency_key", LONE, "idempotency_key"),
    ("max_attempts", 0, "max_attempts"),
    ("max_attempts", 101, "max_attempts"),
    ("deadline_seconds", 0, "deadline_seconds"),
    ("deadline_seconds", NAN, "deadline_seconds"),
    ("deadline_seconds", INF, "deadline_seconds"),
    ("priority", -1, "priority"),
    ("priority", 10, "priority"),
    ("metadata", {"street": 3}, "metadata.street"),
    ("metadata", {"a": "x" * 513}, "metadata.a"),
    ("metadata", {"k" * 65: "x"}, "metadata." + "k" * 65),
    ("metadata", {"a": LONE}, "metadata.a"),
    ("metadata", {str(n): "" for n in range(17)}, "metadata"),
    ("messages", [], "messages"),
    ("messages", "hello", "messages"),
    ("messages", ["hello"], "messages[0]"),
    ("messages", [{"role": "robot", "content": "x"}], "messages[0].role"),
    ("messages", [*HELLO, {"content": "x"}], "messages[1].role"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content"),
    ("messages", [{"role": "user", "content": LONE}], "messages[0].content"),
    ("messages", [{"role": "user", "content": b"\xff\xfe"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": "x", "nmae": "y"}], "messages[0].nmae"),
]


def refusal(fields: Any) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as refused:
        JobRequest.parse(fields)
    return refused.value


@pytest.mark.parametrize(("name", "value", "field"), REFUSED_VALUES)
def test_refusal_names_its_field(name: str, value: Any, field: str) -> None:
    """A bad value is refused by the dotted path of its field, at the head of the message."""
    good = {"model": "echo"} | ({} if name == "messages" else {"prompt": "hello"})
    error = refusal(good | {name: value})
    assert error.field == field
    assert str(error) == f"{field}: {error.message}"
    assert error.message


@pytest.mark.parametrize("name", ["temprature", "streamed", "structured", "tuple", "nullable", "function-x", "a b"])
def test_unknown_field(name: str) -> None:
    """A field that the contract does not know is refused by its name, whatever the name is."""
    error = refusal({"model": "echo", "prompt": "hello", name: 1})
    assert (error.field, error.code) == (name, "unknown_parameter")


def test_missing_model() -> None:
    """A request names its model."""
    error = refusal({"prompt": "hello"})
    assert (error.field, error.code) == ("model", "missing_required_parameter")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "messages"),
        ({"prompt": None, "messages": None}, "messages"),
        ({"prompt": "hello", "messages": HELLO}, "prompt"),
        ({"prompt": "hello", "conversation": "c"}, "conversation"),
    ],
)
def test_exactly_one_input(fields: dict[str, Any], field: str) -> None:
    """Messages or a prompt, one of them; a turn of a conversation takes messages."""
    assert refusal({"model": "echo"} | fields).field == field


@pytest.mark.parametrize("body", [None, "hello", 3, [], [("model", "echo")]])
def test_no_object(body: Any) -> None:
    """What is no mapping at all is refused as a request."""
    assert refusal(body).field == "request"


def test_a_request_passes_through() -> None:
    """A request that was checked before is not checked again."""
    request = JobRequest(model="echo", prompt="hello")
    assert JobRequest.parse(request) is request


def test_immutable() -> None:
    """A checked request stays what was checked."""
    with pytest.raises(ValidationError, match="frozen"):
        JobRequest(model="echo", prompt="hello").max_tokens = 0


@pytest.mark.parametrize(
    "awkward",
    [
        "\u0000",
        "a\u0000b",
        "\U0001f600 astral",
        "\x01\x1f\x7f\x80\x9f",
        "\r\n\t",
        "\u2028\u2029",
        '"\\/',
        "\ufffd\uffff",
        "e\u0301",
    ],
)
def test_awkward_text_survives(awkward: str) -> None:
    """NUL, control and astral characters, and composed ones, come back as they were sent."""
    fields = {"model": "echo", "messages": [{"role": "user", "content": awkward}], "metadata": {"k": awkward}}
    request = JobRequest.parse(fields)
    stored = request.payload()
    assert json.loads(stored) == fields
    assert JobRequest.parse(json.loads(stored)) == request


@given(
    prompt=text.filter(bool) | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
    temperature=st.none() | st.floats(0, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.lists(text.filter(bool), max_size=3),
    metadata=st.dictionaries(text.filter(bool), text, max_size=3),
)
def test_payload_round_trip(**fields: Any) -> None:
    """A payload reads back as the same request and writes out as the same bytes."""
    request = JobRequest.parse({"model": "echo"} | fields)
    again = JobRequest.parse(json.loads(request.payload()))
    assert again == request
    assert again.payload().encode() == request.payload().encode()
    assert again.digest() == request.digest()


def test_payload_leaves_defaults_out() -> None:
    """What is at its default takes no room in the table."""
    assert json.loads(JobRequest(model="echo", prompt="hi", n=1, top_p=1.0, metadata={}).payload()) == {
        "model": "echo",
        "prompt": "hi",
    }


def test_digest_ignores_the_idempotency_key_only() -> None:
    """Two requests are the same if nothing but their keys differ."""
    plain = JobRequest.parse({"model": "echo", "messages": HELLO})
    keyed = JobRequest.parse({"model": "echo", "messages": HELLO, "idempotency_key": "k"})
    assert keyed.digest() == plain.digest()
    assert keyed.payload() != plain.payload()


OTHERS: dict[str, Any] = {
    "model": "other",
    "messages": [{"role": "user", "content": "hello "}],
    "max_tokens": 1,
    "n": 2,
    "temperature": 0.0,
    "top_p": 0.5,
    "top_k": 1,
    "min_p": 0.5,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "repetition_penalty": 1.5,
    "logit_bias": {1: 1.0},
    "seed": 0,
    "stop": ("x",),
    "stop_token_ids": (1,),
    "min_tokens": 1,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "response_format": {"type": "json_object"},
    "regex": "x",
    "choice": ("x",),
    "ignore_eos": True,
    "conversation": "c",
    "instructions": "x",
    "stream": True,
    "max_attempts": 1,
    "deadline_seconds": 1.0,
    "priority": 0,
    "metadata": {"a": "b"},
    "webhook": "https://a.example/",
}


@pytest.mark.parametrize("name", sorted(JobRequest.model_fields.keys() - {"prompt", "echo", "idempotency_key"}))
def test_digest_sees_every_other_field(name: str) -> None:
    """A request that differs in any field but the key is another request."""
    plain = {"model": "echo", "messages": HELLO}
    assert JobRequest.parse(plain | {name: OTHERS[name]}).digest() != JobRequest.parse(plain).digest()


def test_digest_sees_an_echo() -> None:
    """It goes with a prompt, not with messages."""
    plain = JobRequest(model="echo", prompt="hi")
    assert JobRequest(model="echo", prompt="hi", echo=True).digest() != plain.digest()


def test_digest_sees_the_prompt() -> None:
    """A text and the tokens that spell it are different prompts."""
    prompts: list[Any] = ["hi", "hi ", (104, 105)]
    assert len({JobRequest(model="echo", prompt=prompt).digest() for prompt in prompts}) == len(prompts)


def test_error_message_can_be_stored() -> None:
    """An error may quote what an exception held: what Postgres cannot keep is replaced, the rest stays."""
    assert JobError(code="c", message="a\x00b\ud800c \U0001f600").message == "a\ufffdb?c \U0001f600"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"regex": "a", "min_tokens": 1}, "min_tokens"),
        ({"choice": ["a"], "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_cannot_be_together_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    """Each by itself would do."""
    with pytest.raises(RequestInvalid) as refused:
        JobRequest.parse({"model": "m", "prompt": "x"} | fields)
    assert refused.value.field == field


def test_only_a_prompt_is_echoed() -> None:
    """A chat has no text to put an answer behind."""
    with pytest.raises(RequestInvalid) as refused:
        JobRequest.parse({"model": "m", "messages": HELLO, "echo": True})
    assert refused.value.field == "echo"


def test_a_schema_is_kept_in_its_order() -> None:
    """The order of a schema's properties is that of the answer's: storing the request must not change it."""
    schema = {"type": "object", "properties": {"z": {}, "a": {}, "\0": {}}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    request = JobRequest.parse({"model": "m", "prompt": "x", "response_format": form})
    stored = JobRequest.model_validate_json(request.payload())
    assert stored == request
    assert list(stored.response_format["json_schema"]["schema"]["properties"]) == ["z", "a", "\0"]


def test_a_stored_choice_has_no_more_than_it_needs() -> None:
    """Most answers have no log probabilities; those that have are read back as they were."""
    assert Choice(index=0, text="a", finish_reason="stop").stored() == {
        "index": 0,
        "text": "a",
        "finish_reason": "stop",
    }
    told = (TokenLogprob(token="a", id=1), TokenLogprob(token="b", id=2, logprob=-1.5, top=(("b", -1.5), ("c", -2.0))))
    choice = Choice(index=0, text="ab", finish_reason="stop", logprobs=told)
    assert Choice.model_validate_json(json.dumps(choice.stored())) == choice
